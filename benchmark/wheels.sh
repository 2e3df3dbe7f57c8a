#!/usr/bin/env bash
# Whether all of requirements-dev.txt, and what that needs in turn, has wheels on each system of README.md; needs uv.
set -u
cd "$(dirname "$0")/.."
export MACOSX_DEPLOYMENT_TARGET=14.0
failed=0
for system in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin; do
    for python in 3.11 3.12 3.13; do
        if uv pip compile --quiet --only-binary :all: --python-version $python --python-platform $system \
            requirements-dev.txt >/dev/null; then
            echo "$system, Python $python: wheels of all"
        else
            failed=1
        fi
    done
done
exit $failed
