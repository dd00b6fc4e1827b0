#!/usr/bin/env bash
# All stages of an experiment as jobs: launchers/pipeline.sh CONFIG.yaml [key=value ...] [--dry-run]
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
. "${CALM_SITE:-$ROOT/launchers/site.env}"
PYTHONPATH=$ROOT exec "$CALM_HOST_PYTHON" -m calm_core.cluster.chain "$@"
