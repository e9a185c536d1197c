#!/usr/bin/env bash
# Build the image, from the root of the checkout:
#
#   containers/image.sh name            the file that belongs to this lock and definition
#   containers/image.sh wheelhouse      wheels of the lock, by a Python of the base's version (PYTHON)
#   containers/image.sh online          from a registry (make image)
#   containers/image.sh offline BASE    from a folder or SIF, and the wheelhouse; no network (make image-offline)
#
# Snakemake tracks an image by its path only, so the path holds the hash of what the image is made from: a new lock is a
# new file, and what was computed in the old one runs again. `containers/kvpipe.sif` points to the image in use.
# VARIANT names the build of torch (cuda, cpu, …), TORCH_INDEX an index that has it, APPTAINER_OPTIONS go to the build.
set -euo pipefail
cd "$(dirname "$0")/.."

VARIANT=${VARIANT:-cuda}
APPTAINER=${APPTAINER:-apptainer}
WHEELHOUSE=${WHEELHOUSE:-containers/wheelhouse}

name() {
    local hash
    hash=$(cat requirements.lock containers/kvpipe.def | sha256sum | cut -c 1-12)
    echo "containers/kvpipe-$VARIANT-$hash.sif"
}

wheelhouse() {
    local wheel=("${PYTHON:-python3}" -m pip wheel --disable-pip-version-check --wheel-dir "$WHEELHOUSE" --constraint requirements.lock)
    # torch brings its own CUDA packages, which no lock for all machines can list; the rest is exactly the lock
    "${wheel[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.lock)"
    "${wheel[@]}" --find-links "$WHEELHOUSE" --requirement requirements.lock
    echo "$WHEELHOUSE: $(find "$WHEELHOUSE" -name '*.whl' | wc -l) wheels, $(du -sh "$WHEELHOUSE" | cut -f 1)"
}

build() {
    local target partial
    target=$(name)
    partial=$target.partial
    command -v "$APPTAINER" > /dev/null ||
        { echo "$APPTAINER is not on the PATH: load the site's module, or name it with APPTAINER=" >&2; exit 1; }
    if [[ -e $target ]]; then
        echo "$target is up to date with requirements.lock and containers/kvpipe.def"
    else
        # shellcheck disable=SC2086  # several options
        "$APPTAINER" build --force ${APPTAINER_OPTIONS:-} \
            --build-arg variant="$VARIANT" --build-arg torch_index="${TORCH_INDEX:-default}" \
            --build-arg commit="$(git rev-parse HEAD 2> /dev/null || echo unknown)" \
            "$@" "$partial" containers/kvpipe.def
        mv "$partial" "$target"
    fi
    # read by the Snakefile into every artefact's provenance
    [[ -e $target.sha256 ]] || (cd containers && sha256sum "${target##*/}" > "${target##*/}.sha256")
    ln -sfn "${target##*/}" containers/kvpipe.sif
    echo "containers/kvpipe.sif -> ${target##*/}"
}

case "${1:-}" in
    name) name ;;
    wheelhouse) wheelhouse ;;
    online)
        empty=$(mktemp -d)
        trap 'rmdir "$empty"' EXIT
        build --build-arg wheelhouse="$empty"
        ;;
    offline)
        base=${2:-}
        [[ -n $base && -e $base ]] ||
            { echo "make image-offline needs BASE=, a folder or SIF with Python 3.11 or later; '$base' is none" >&2; exit 1; }
        compgen -G "$WHEELHOUSE/*.whl" > /dev/null ||
            { echo "$WHEELHOUSE has no wheels: run make wheelhouse on a machine with a network and bring the folder along" >&2; exit 1; }
        build --build-arg bootstrap=localimage --build-arg from="$base" --build-arg wheelhouse="$WHEELHOUSE"
        ;;
    *)
        sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
