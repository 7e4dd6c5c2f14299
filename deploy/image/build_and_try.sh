#!/usr/bin/env bash
# Build the Dockerfile without Docker and try the result as a container runtime would start it: its own
# user, no capabilities, a read-only root file system, two volumes, no model until the first start.
#
#   deploy/image/build_and_try.sh
#
# Needs root, a Debian with buildah, debootstrap and curl, some 8 GB of disk and TCP port 8000. The base
# image is made from Debian's packages, so that no image registry is needed. pip inside the build uses the
# indexes of `pip config list` here: local ones and the certificates are mounted while it runs, and
# nothing but empty mount points of them ends up in the image.
#
# Environment:
#   WORK    directory for everything; a new one under TMPDIR, removed at the end, if unset. A given one is kept.
#   SUITE   Debian release of the base image (bookworm)
#   MIRROR  where debootstrap gets it (its own default)
#   ROOTFS  a root file system to take instead of calling debootstrap
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SUITE=${SUITE:-bookworm}
MIRROR=${MIRROR:-}
PORT=8000 # the image's own
URL=http://127.0.0.1:$PORT
FIRST_START_S=600 # downloads and converts the base model
IMAGE=localhost/dalorra:try
BASE=localhost/dalorra-base:try

fail() { printf 'build_and_try: %s\n' "$*" >&2; exit 1; }
say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

for tool in buildah chroot curl debootstrap nsenter python3 setpriv tar unshare; do
  command -v "$tool" >/dev/null || fail "$tool is not installed"
done
[ "$(id -u)" -eq 0 ] || fail 'must run as root'
! curl --silent --output /dev/null --max-time 2 "$URL" || fail "port $PORT is in use"

if [ -n "${WORK:-}" ]; then mkdir -p "$WORK"; else WORK=$(mktemp -d) && remove=$WORK; fi
server=
buildah() {
  command buildah --storage-driver vfs --root "$WORK/storage" --runroot "$WORK/run" "$@"
}
clean_up() {
  if [ -n "$server" ]; then kill -KILL "$server" 2>/dev/null || true; fi
  buildah umount --all >/dev/null 2>&1 || true
  if [ -n "${remove:-}" ]; then rm -rf -- "$remove"; fi
}
trap clean_up EXIT

# --- what pip needs: mounts, none of which becomes a part of the image -----------------------------

pip_settings() { # KEY = VALUE lines; an environment variable wins over a file, as in pip itself
  python3 -m pip config list | sort -r \
    | sed -n "s/^\(global\|install\|download\|user\|site\|:env:\)\.\([a-z-]*\)='\(.*\)'$/\2 = \3/p" \
    | awk '{ seen[$1] = $0 } END { for (key in seen) print seen[key] }'
}

pip_mounts() { # SOURCE lines: local indexes, with the files beside them, certificates and constraints
  sed -n 's/^\(find-links\|cert\|constraint\) = //p' "$WORK/pip.conf" | tr -s ' ' '\n' | sed -n 's|^\(file://\)\?/|/|p'
  sed -n 's/^\(index-url\|extra-index-url\) = //p' "$WORK/pip.conf" | tr -s ' ' '\n' \
    | sed -n 's|^file:///\(.*\)/[^/]*/\?$|/\1|p'
}

prepare_pip() {
  { printf '[global]\n'; pip_settings; } >"$WORK/pip.conf"
  mounts=("$WORK/pip.conf:/etc/pip.conf")
  while read -r source; do
    if [ -e "$source" ]; then mounts+=("$(realpath "$source"):$source"); fi
  done < <(pip_mounts | sort -u)
}

# --- build -----------------------------------------------------------------------------------------

make_base() {
  if [ -z "${ROOTFS:-}" ]; then
    ROOTFS=$WORK/rootfs
    say "base: debootstrap $SUITE"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
      "$SUITE" "$ROOTFS" ${MIRROR:+"$MIRROR"} >"$WORK/debootstrap.log" 2>&1 \
      || { tail -n 20 "$WORK/debootstrap.log" >&2; fail 'debootstrap failed'; }
  fi
  mkdir -p "$WORK/base"
  tar --create --directory "$ROOTFS" --exclude './dev/*' --exclude './var/cache/apt/*' \
    --file "$WORK/base/rootfs.tar" .
  printf 'FROM scratch\nADD rootfs.tar /\n' >"$WORK/base/Dockerfile"
  buildah bud --quiet --tag "$BASE" "$WORK/base" >/dev/null
  rm -rf "$WORK/base" "$WORK/rootfs"
}

build_image() {
  local volumes=()
  for mount in "${mounts[@]}"; do volumes+=(--volume "$mount:ro"); done
  say 'image: buildah bud'
  buildah bud --format docker --isolation chroot --network host --pull-never "${volumes[@]}" \
    --build-arg BASE="$BASE" --build-arg GIT_SHA="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
    --tag "$IMAGE" . >"$WORK/build.log" 2>&1 \
    || { tail -n 40 "$WORK/build.log" >&2; fail 'the build failed'; }
  buildah inspect --type image "$IMAGE" >"$WORK/image.json"
}

config() { # NAME: an entry of the image's configuration, one line per element
  python3 - "$WORK/image.json" "$1" <<'PYTHON'
import json, sys
value = json.load(open(sys.argv[1]))["Docker"]["config"]
for name in sys.argv[2].split("."):
    value = value[name]
print(*([value] if isinstance(value, str) else value), sep="\n")
PYTHON
}

check_image() {
  local root=$1 found
  [ "$(config User)" = 10001:10001 ] || fail "the image's user is $(config User)"
  [ "$(config StopSignal)" = SIGTERM ] || fail "the image stops with $(config StopSignal)"
  found=$(find "$root/opt" "$root/var/cache/dalorra" -name '*.gguf' -o -path '*base_models/*.safetensors')
  [ -z "$found" ] || fail "a model is baked in: $found"
  found=$(find "$root/opt" -xdev \( -user 10001 -o -perm -o+w ! -type l \) | head -n 3)
  [ -z "$found" ] || fail "the user can write $found"
  found=$(find "$root/etc/pip.conf" "$root/etc/pip" -size +0 2>/dev/null || true)
  [ -z "$found" ] || fail "pip's configuration of this machine is in the image: $found"
  say "image: $(du -sm "$root" | cut -f1) MB, of them $(du -sm "$root/opt/dalorra/venv" | cut -f1) MB" \
    "Python packages and $(du -sm "$root/opt/dalorra/adapters" | cut -f1) MB adapters"
}

# --- run -------------------------------------------------------------------------------------------

# Everything after the mounts is exec, so that the caller's $! is the server itself.
start_server() {
  local root=$1 user environment command
  IFS=: read -r user _ < <(config User)
  mapfile -t environment < <(config Env)
  if [ -n "${api_keys:-}" ]; then environment+=("DALORRA_API_KEYS_FILE=$api_keys"); fi
  mapfile -t command < <(config Entrypoint; config Cmd)
  # shellcheck disable=SC2016  # expanded inside
  ROOT=$root HOME=$WORK unshare --mount -- bash -euc '
    mount --make-rprivate /
    mount --bind "$ROOT" "$ROOT"
    while read -r source target mode; do
      target=$ROOT$target
      if [ -d "$source" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; touch "$target"; fi
      mount --bind "$source" "$target"
      if [ "$mode" = ro ]; then mount -o remount,bind,ro "$target"; fi
    done <"$HOME/mounts"
    mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
    mount -t proc proc "$ROOT/proc"
    mount --rbind /dev "$ROOT/dev"
    mount -o remount,bind,ro "$ROOT"
    exec chroot "$ROOT" setpriv --reuid "$1" --regid "$1" --clear-groups --no-new-privs \
      --bounding-set=-all --inh-caps=-all env --ignore-environment --chdir "${@:2}"
  ' start "$user" "$(config WorkingDir)" "${environment[@]}" "${command[@]}" 2>>"$WORK/server.log" &
  server=$!
}

inside() { # COMMAND...: run in the server's file system, as its user
  nsenter --mount --target "$server" chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups \
    env --ignore-environment "${environment[@]}" "$@"
}

wait_ready() {
  local end_s=$((SECONDS + FIRST_START_S))
  until curl --silent --fail --output /dev/null "$URL/health/ready"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$WORK/server.log" >&2; fail 'the server ended'; }
    [ "$SECONDS" -lt "$end_s" ] || { tail -n 20 "$WORK/server.log" >&2; fail 'the server is not ready'; }
    sleep 0.2
  done
}

classify() {
  curl --silent --fail "$URL/v1/classify" --header 'content-type: application/json' \
    --header "authorization: Bearer $(cat "$WORK/secrets/infer_api_key")" \
    --data '{"input": "transfer 100 dollars from checking to savings"}' >"$WORK/answer.json"
  python3 - "$WORK/answer.json" <<'PYTHON'
import json, sys
row = json.load(open(sys.argv[1]))["data"][0]
assert row["label"] == "transfer", row["label"]
print(f"         {row['label']}, confidence {row['confidence']:.4f}, {row['decision']}")
PYTHON
}

stop_server() {
  local status=0
  kill -TERM "$server"
  wait "$server" || status=$?
  server=
  [ "$status" -eq 0 ] || fail "the server left with status $status after SIGTERM"
}

try_image() {
  local root=$1 environment health began_s status api_keys=
  mapfile -t environment < <(config Env)
  mapfile -t health < <(config Healthcheck.Test)
  mkdir -p "$WORK/cache" "$WORK/state"
  chown 10001:10001 "$WORK/cache" "$WORK/state"
  deploy/make_secrets.sh "$WORK/secrets" >/dev/null
  {
    printf '%s/cache /var/cache/dalorra rw\n%s/state /var/lib/dalorra rw\n' "$WORK" "$WORK"
    printf '%s/secrets/api_keys /run/secrets/api_keys ro\n' "$WORK"
    printf '%s ro\n' "${mounts[@]/:/ }"
    printf '/etc/resolv.conf /etc/resolv.conf ro\n'
  } >"$WORK/mounts"

  began_s=$SECONDS
  start_server "$root"
  status=0
  wait "$server" || status=$?
  server=
  [ "$status" -eq 2 ] || fail "without API keys the server left with status $status, not 2"
  say 'without API keys it does not start'
  api_keys=/run/secrets/api_keys
  start_server "$root"
  wait_ready
  say "first start: ready after $((SECONDS - began_s)) s, with $(du -sm "$WORK/cache" | cut -f1) MB fetched"
  classify
  [ "$(curl --silent --output /dev/null --write-out '%{http_code}' "$URL/metrics")" = 401 ] \
    || fail 'the server answers without a key'
  inside "${health[@]:1}" || fail 'HEALTHCHECK fails on a server that is ready'
  if inside touch /opt/dalorra/written 2>/dev/null || inside touch /written 2>/dev/null; then
    fail 'the root file system can be written'
  fi
  grep -q '^CapEff:[[:space:]]*0*$' "/proc/$server/status" || fail 'the server has capabilities'
  say "HEALTHCHECK passes; the root file system is read-only; uid $(stat -c %u "/proc/$server")," \
    "no capabilities, peak memory $(awk '/^VmHWM/ { print int($2 / 1024) }' "/proc/$server/status") MB"
  began_s=$SECONDS
  stop_server
  say "SIGTERM: exit 0 after $((SECONDS - began_s)) s"
  began_s=$SECONDS
  start_server "$root"
  wait_ready
  say "second start, from the volume: ready after $((SECONDS - began_s)) s"
  classify
  stop_server
  [ "$(find "$WORK/state" -type f | wc -l)" -gt 0 ] || fail 'no state was written to its volume'
  say "state: $(find "$WORK/state" -type f -printf '%f (%m) ')"
}

prepare_pip
make_base
build_image
container=$(buildah from --pull-never "$IMAGE")
root=$(buildah mount "$container")
check_image "$root"
try_image "$root"
say 'the image builds and works'
