#!/usr/bin/env bash
# Everything about a graphics card in one command, for one short loan of one: tests first, then tables.
#   bash benchmarks/gpu.sh [--minutes 9] [--out FOLDER] [--packages FOLDER] [--dry-run] ...
# --packages: a folder made by `pip install --target` with what the machine lacks (einops,
# safetensors, pytest; diffusers for variant B). PYTHON names the interpreter, OUT the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
packages=""
previous=""
for word in "$@"; do
  case "$word" in --packages=*) packages="${word#*=}" ;; esac
  if [ "$previous" = "--packages" ]; then packages="$word"; fi
  previous="$word"
done
# Behind what is installed: a carried package never hides the machine's own.
export GENDR_PACKAGES="$packages"
exec "$python" benchmarks/start_gpu.py "$@"
