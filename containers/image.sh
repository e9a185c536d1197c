#!/usr/bin/env bash
# Build the image, from the root of the checkout:
#
#   containers/image.sh name            the file that belongs to this lock and definition
#   containers/image.sh wheelhouse      wheels of image.lock, by a Python of the base's version (PYTHON)
#   containers/image.sh online          from a registry (make image)
#   containers/image.sh offline BASE    from a folder or SIF, and the wheelhouse; no network (make image-offline)
#
# Snakemake tracks an image by its path only, so the path holds the hash of what the image is made from: a new lock is a
# new file, and what was computed in the old one runs again. `containers/kvpipe.sif` points to the image in use.
# VARIANT names the build of torch (cuda, cpu, …) and is part of the file's name; the build is refused where the index, or
# TORCH_INDEX, serves another. APPTAINER_OPTIONS go to the build.
set -euo pipefail
cd "$(dirname "$0")/.."

[[ -z ${TORCH_INDEX:-} || -n ${VARIANT:-} || ${1:-} == wheelhouse ]] || {
    echo "TORCH_INDEX is another build of torch, which needs another name: VARIANT=cu126 TORCH_INDEX=…" >&2
    exit 1
}
VARIANT=${VARIANT:-cuda}
APPTAINER=${APPTAINER:-apptainer}
WHEELHOUSE=${WHEELHOUSE:-containers/wheelhouse}
LOCK=containers/image.lock

name() {
    local hash
    hash=$(cat "$LOCK" containers/kvpipe.def | sha256sum | cut -c 1-12)
    echo "containers/kvpipe-$VARIANT-$hash.sif"
}

wheelhouse() {
    local wheel=("${PYTHON:-python3}" -m pip wheel --disable-pip-version-check --wheel-dir "$WHEELHOUSE" --constraint "$LOCK")
    local torch
    torch=$(grep '^torch==' "$LOCK")
    # torch brings its own CUDA packages, which no lock for all machines can list; the rest is exactly the lock
    torch() { "${wheel[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$1"; }
    { [[ $VARIANT == cpu ]] && torch "$torch+cpu"; } || torch "$torch"
    "${wheel[@]}" --find-links "$WHEELHOUSE" --requirement "$LOCK"
    echo "$WHEELHOUSE: $(find "$WHEELHOUSE" -name '*.whl' | wc -l) wheels, $(du -sh "$WHEELHOUSE" | cut -f 1)"
}

build() {
    local target partial wheels=$1
    shift
    [[ $wheels != *[[:space:]]* ]] ||
        { echo "apptainer copies from no path with a space: '$wheels'; set WHEELHOUSE (online: TMPDIR)" >&2; exit 1; }
    target=$(name)
    partial=$target.partial
    command -v "$APPTAINER" > /dev/null ||
        { echo "$APPTAINER is not on the PATH: load the site's module, or name it with APPTAINER=" >&2; exit 1; }
    if [[ -e $target ]]; then
        echo "$target is up to date with $LOCK and containers/kvpipe.def"
    else
        # shellcheck disable=SC2086  # several options
        "$APPTAINER" build --force ${APPTAINER_OPTIONS:-} \
            --build-arg variant="$VARIANT" --build-arg torch_index="${TORCH_INDEX:-default}" \
            --build-arg wheelhouse="$wheels" --build-arg commit="$(git rev-parse HEAD 2> /dev/null || echo unknown)" \
            "$@" "$partial" containers/kvpipe.def
        rm -f "$target.sha256" # of an image that was here before
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
        build "$empty"
        ;;
    offline)
        base=${2:-}
        [[ -n $base && -e $base ]] ||
            { echo "make image-offline needs BASE=, a folder or SIF with Python 3.11 or later; '$base' is none" >&2; exit 1; }
        compgen -G "$WHEELHOUSE/*.whl" > /dev/null ||
            { echo "$WHEELHOUSE has no wheels: run make wheelhouse on a machine with a network and bring the folder along" >&2; exit 1; }
        build "$WHEELHOUSE" --build-arg bootstrap=localimage --build-arg from="$base"
        ;;
    *)
        sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
