#!/usr/bin/env bash
# Check, then submit one launcher: launchers/submit.sh calm_xl [--nodes=32] [CONFIG.yaml] [key=value ...] [--dry-run]
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
. "${CALM_SITE:-$ROOT/launchers/site.env}"
PYTHONPATH=$ROOT exec "$CALM_HOST_PYTHON" -m calm_core.cluster.launcher "$@"
