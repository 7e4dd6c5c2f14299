#!/bin/sh
# Write the secret files that docker-compose.yml mounts; a file that is there is left as it is.
#
#   feedback_secret          signs prediction ids
#   grafana_admin_password   of Grafana's user admin
#   api_keys                 what the server knows of its API keys: their hashes, never the keys
#   metrics_api_key          the key that Prometheus sends; may read /metrics, nothing else
#   infer_api_key            a key for you: may classify and send feedback; no container gets it
#
# Containers read them under other user ids than yours, so the files are readable for all and their
# directory is closed: a container sees the one file it was given, and nobody else gets to any.
# More keys: dalorra keys create NAME --file deploy/secrets/api_keys --scope infer
set -eu
directory=${1:-"$(dirname "$0")/secrets"}

random_hex() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; } # 32 random bytes

sha256_of() { # FILE
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

put() { # FILE: standard input, written whole or not at all
  cat >"$1.new"
  chmod 444 "$1.new"
  mv "$1.new" "$1"
  echo "wrote $1"
}

entry() { # ID, FILE OF THE KEY, SCOPES
  printf '{"id": "%s", "sha256": "%s", "scopes": [%s], "created": "%s"}' \
    "$1" "$(sha256_of "$2")" "$3" "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
}

mkdir -p "$directory"
chmod 700 "$directory"
for name in feedback_secret grafana_admin_password; do
  file=$directory/$name
  if [ -s "$file" ]; then continue; fi
  random_hex | put "$file"
done

keys=$directory/api_keys
if [ -s "$keys" ]; then
  # it may hold keys of yours by now, so it is never written again
  if [ ! -s "$directory/metrics_api_key" ]; then
    echo "$keys is there and metrics_api_key is not: make Prometheus a key with" >&2
    echo "  dalorra keys create NAME --file $keys --scope metrics >$directory/metrics_api_key" >&2
    echo "or remove $keys to begin anew" >&2
    exit 1
  fi
  exit 0
fi
for name in metrics_api_key infer_api_key; do
  file=$directory/$name
  if [ -s "$file" ]; then continue; fi
  printf 'dk_%s' "$(random_hex)" | put "$file"
done
{
  printf '{"version": 1, "keys": [\n '
  entry prometheus "$directory/metrics_api_key" '"metrics"'
  printf ',\n '
  entry compose "$directory/infer_api_key" '"infer", "feedback"'
  printf '\n]}\n'
} | put "$keys"
