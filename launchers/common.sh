# The end of every launcher: the site's settings, then the job's process. FILE is the launcher's path.

NAME=$(basename "$FILE" .slurm)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
. "${CALM_SITE:-$ROOT/launchers/site.env}"
cd "${CALM_WORK:-$ROOT}" || exit 2
export PYTHONPATH=$ROOT OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# launch STAGE CONFIG [ARGUMENTS]: replaces the batch script by the process that runs the job, which gets its signals.
launch() {
	local stage=$1 config=$ROOT/$2
	shift 2
	exec "$CALM_HOST_PYTHON" -m calm_core.cluster.job --stage "$stage" --config "$config" "$@"
}
