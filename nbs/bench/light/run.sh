#!/usr/bin/env bash
# run.sh PART...: parts of the first half hour on a GPU; README.md beside this says which and when. Settings, from outside:
# OUT results (out/light), LIGHT what prepare.py made (.light), DEVICE (cuda), and LIMIT_<part>, its seconds.
set -uo pipefail
cd "$(dirname "$0")/../../.."
here=nbs/bench/light
export OUT=${OUT:-$PWD/out/light} LIGHT=${LIGHT:-$PWD/.light} DEVICE=${DEVICE:-cuda} WORK=${WORK:-$PWD/.light-work}
export PYTHONUNBUFFERED=1 PYTHONPATH=$WORK/site:$PWD TOCOAD_CACHE=$WORK/cache TOCOAD_STORE=$WORK/store MPLBACKEND=agg
mkdir -p "$OUT" "$WORK/data"
start=$(date +%s)
say() { echo "== $* ($(($(date +%s) - start)) s)"; }
python=${PYTHON:-python3}
chosen=$([ "$DEVICE" = cpu ] && echo "-k cpu" || echo "-m cuda")

if compgen -G "$LIGHT/whl/*.whl" > /dev/null && [ ! -d "$WORK/site" ]; then
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$WORK/site" "$LIGHT"/whl/*.whl || exit
fi
for t in "$LIGHT"/*.tar; do [ -e "$t" ] && tar -xf "$t" -C "$WORK/data"; done
$python -c "import torch, tocoad; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
say ready

part() { # name, seconds, command
    say "$1"
    timeout -k 5 "$2" "${@:3}" 2>&1 | tee "$OUT/$1.txt"
    say "$1 ended with status $?"
}

for p in "$@"; do
    case $p in
        correct) part correct "${LIMIT_correct:-110}" \
            $python -m pytest -vv -s -p no:cacheprovider --tb=short $chosen tests/test_cuda.py ;;
        speed) part speed "${LIMIT_speed:-220}" \
            $python $here/speed.py "$OUT" --device "$DEVICE" ${SPEED:---set compiled=False copies=(4,)} ;;
        epochs) limit=${LIMIT_epochs:-250}
            OMP_NUM_THREADS=1 part epochs $((limit + 15)) \
                $python $here/epochs.py "$WORK/data" "$OUT" --device "$DEVICE" --seconds "$limit" ${EPOCHS:-} ;;
        change) part change "${LIMIT_change:-90}" \
            $python $here/change.py "$OUT" --device "$DEVICE" ${CHANGE:-} ;;
        *) echo "there is no part $p: take correct, speed, epochs or change" ;;
    esac
done
