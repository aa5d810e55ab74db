#!/usr/bin/env bash
# Make the virtual environment that `make bench` and `make test` use: headfold itself, editable, with the PyTorch
# that fits this machine. Runs again only when pyproject.toml, constraints.txt or this file changes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

fail() {
  printf 'headfold setup: %s\n' "$1" >&2
  exit 1
}

command -v "$PYTHON" >/dev/null || fail "'$PYTHON' is not there; install Python 3.11 or newer, or pass PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$PYTHON" --version) is too old; headfold needs Python 3.11 or newer (pass PYTHON=...)"

# A Python that already has a CUDA build of PyTorch keeps it: it fits the driver, and nothing large is installed.
torch_there() {
  "$PYTHON" - <<'PY' 2>/dev/null
import sys, torch
version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(not (torch.cuda.is_available() and (2, 11) <= version < (2, 16)))
PY
}

gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

options=()
constraints=(-c constraints.txt)
torch=torch
if gpu; then
  constraints=()
  if torch_there; then
    options=(--system-site-packages)
  else
    cuda=$(nvidia-smi | sed -n 's/.*CUDA[^:]*Version: *\([0-9]*\).*/\1/p' | head -n 1)
    [ "${cuda:-0}" -ge 13 ] || fail "the NVIDIA driver supports CUDA ${cuda:-?}, and the PyTorch builds (2.11 to 2.15) \
that pip installs by default need 13; update the driver to 580 or newer, or install a matching torch into $PYTHON first"
    torch='torch>=2.11,<2.16'
  fi
fi

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "${options[@]}" "$VENV" ||
    fail "'$PYTHON -m venv' failed; on Debian and Ubuntu install python3-venv (and python3-dev)"
fi
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
[ "${#options[@]}" -gt 0 ] || "${pip[@]}" "${constraints[@]}" "$torch"
"${pip[@]}" "${constraints[@]}" -e '.[test,lint]'
