#!/bin/sh
# Run by the Containerfile: `packages` puts the locked wheels into /opt/distillery, `code` puts our own into /code.
set -eu
cd /build
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# Both come with --secret: they may hold passwords, and neither is in the image or its history afterwards.
if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi
if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi

into() { /build/tools/bin/python -m pip --python /opt/distillery/bin/python install --no-deps --only-binary :all: "$@"; }

packages() {
  case "$VARIANT:$TORCH_INDEX" in
    cpu:* | gpu:) ;;
    gpu:*) echo "TORCH_INDEX=$TORCH_INDEX: it holds builds of torch without CUDA, for VARIANT=cpu" >&2; exit 2 ;;
    *) echo "VARIANT=$VARIANT: it is cpu or gpu" >&2; exit 2 ;;
  esac
  python3 -m venv tools
  tools/bin/python -m pip install --require-hashes --only-binary :all: -r requirements-build.txt
  python3 -m venv --without-pip /opt/distillery

  # Triton compiles GPU kernels. CUDA's libraries stay: without them the torch of the package index cannot be imported.
  left_out=
  if [ "$VARIANT" = cpu ]; then left_out='^triton=='; fi
  if [ -n "$TORCH_INDEX" ]; then left_out='^(triton|torch|torchvision)==|^(nvidia|cuda)-'; fi
  awk -v out="$left_out" '/^[a-z]/ { drop = out != "" && $0 ~ out } !drop' requirements.txt >wanted.txt
  into --require-hashes -r wanted.txt
  if [ -n "$TORCH_INDEX" ]; then
    # Same versions, other builds: their hashes are those that the index itself states.
    into --index-url "$TORCH_INDEX" $(sed -nE 's/^((torch|torchvision)==[^ ;]+).*/\1+cpu/p' requirements.txt)
  fi
}

code() {
  tools/bin/python -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir wheels ./source
  into --no-index --prefix /code wheels/*.whl
}

"$1"
