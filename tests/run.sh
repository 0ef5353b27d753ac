#!/usr/bin/env bash
# Set up whatever the tests need and run all of them:  bash tests/run.sh [arguments of pytest]
# VENV names the virtual environment to use or create (.venv when not set), PROCESSES how many tests
# run at a time (2): each process starts apps and a browser of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

needed=()
command -v chromium >/dev/null || needed+=(chromium)
[ -e /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] || needed+=(fonts-noto-color-emoji)
if [ ${#needed[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q </dev/null
    apt-get install -y -q --no-install-recommends "${needed[@]}" </dev/null
  else
    echo "The browser tests need these packages: ${needed[*]}. Install them, for example with:" >&2
    echo "  sudo apt-get install ${needed[*]}" >&2
    exit 1
  fi
fi

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check \
  -r requirements.txt -r tests/requirements.txt </dev/null

# Threads that spin while they wait stall each other where tests share few cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
"$venv/bin/ruff" check .
exec "$venv/bin/python" -m pytest -n "${PROCESSES:-2}" --dist loadfile "$@" </dev/null
