#!/bin/bash
# Debian's Chromium, for the page's tests, if no browser is there (needs root). Playwright's own is not used: its download
# comes from another host, and has no security updates from the distribution.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
    ! command -v "$name" >/dev/null || exit 0
done
fail() {
    echo "browser: $*" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || fail "no Chromium is installed, and only root can install it"
command -v apt-get >/dev/null || fail "no Chromium is installed, and there is no apt-get to install it with"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    fail "apt-get could not install chromium"
