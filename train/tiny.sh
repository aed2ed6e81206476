#!/usr/bin/env bash
# GenDR-Tiny by the whole recipe: pairs, autoencoder, restorer, base, distillation, figures.
#
#   bash train/tiny.sh PICTURES RUNS [TEACHER]
#
# Every step resumes: the same command again goes on where it was stopped, so that several short loans of
# a card add up. On two CPU cores about four hours. FACTOR=4 takes four times the steps and pairs, .001
# tries in minutes whether all of it runs; BATCH the pictures per step, DEVICE=cuda a card; PRECISION is bf16
# where the device gains by it and fp32 elsewhere; VALIDATE and
# ORIGINALS are folders of damaged pictures and their originals to measure on, NIQE BasicSR's
# niqe_pris_params.npz. TEACHER is a restorer's file that spandrel can read.
set -euo pipefail
if [ $# -ne 2 ] && [ $# -ne 3 ]; then
  sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
fi
pictures=$1 runs=$2
python="${PYTHON:-python3}" factor="${FACTOR:-1}" batch="${BATCH:-8}" device="${DEVICE:-cpu}"
precision="${PRECISION:-$("$python" -c "
from gendr.devices import choose_device, choose_precision
print('bf16' if 'bfloat16' in str(choose_precision(choose_device('$device')).unet) else 'fp32')")}"
plain=(--device "$device" --precision "$precision")
small=("${plain[@]}" --batch "$batch")
teacher=() share=0
if [ $# -eq 3 ]; then teacher=(--teacher "$3") share=0.9; fi
look=() exact=()
if [ "$precision" = fp32 ]; then exact=(--fp32); fi
# A number of steps or pairs times FACTOR, which may be a fraction; at least 2.
times() { awk -v n="$1" -v f="$factor" 'BEGIN { k = int(n * f + .5); print (k < 2) ? 2 : k }'; }
if [ -n "${VALIDATE:-}" ]; then look=(--validate "$VALIDATE" --originals "${ORIGINALS:-}"); fi

"$python" -m train.pairs --data "$pictures" --out "$runs/pairs" --count $(times 20480) --crop 192 \
  --mix tiny --seed 11 --device "$device" "${teacher[@]}" "${exact[@]}"
"$python" -m train.autoencoder --data "$runs/pairs" --out "$runs/autoencoder" --steps $(times 250) "${small[@]}"
"$python" -m train.restorer --data "$runs/pairs" --autoencoder "$runs/autoencoder" --out "$runs/restorer" \
  --steps $(times 8000) --lr 4e-4 --lr-vae 1.5e-4 --teacher-share "$share" --gradient 1 \
  --autoencode .125 "${small[@]}"
"$python" -m train.repa --recipe tiny --data "$runs/pairs" --vae "$runs/restorer/model.safetensors" \
  --out "$runs/base" --steps $(times 1400),$(times 300) "${plain[@]}"
"$python" -m train.cida --recipe tiny --data "$runs/pairs" --base "$runs/base/model.safetensors" \
  --generator "$runs/restorer/model.safetensors" --out "$runs/cida" --steps $(times 500) \
  "${look[@]}" "${small[@]}" --micro-batch "$batch"
if [ -n "${VALIDATE:-}" ]; then
  "$python" -m train.evaluate --data "$VALIDATE" ${ORIGINALS:+--ref "$ORIGINALS"} --out "$runs/report" \
    ${NIQE:+--niqe-params "$NIQE"} --model embedded --model "restorer=$runs/restorer/model.safetensors" \
    --model "cida=$runs/cida/model.safetensors"
fi
