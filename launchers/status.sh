#!/usr/bin/env bash
# The state of a run: launchers/status.sh RUN
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
. "${CALM_SITE:-$ROOT/launchers/site.env}"
PYTHONPATH=$ROOT exec "$CALM_HOST_PYTHON" -m calm_core.cluster.status "$@"
