#!/bin/sh
# Write the secret files that docker-compose.yml mounts; a file that is there is left as it is.
#
# Containers read them under other user ids than yours, so the files are readable for all and their
# directory is closed: a container sees the one file it was given, and nobody else gets to any.
set -eu
directory=${1:-"$(dirname "$0")/secrets"}

mkdir -p "$directory"
chmod 700 "$directory"
for name in feedback_secret metrics_api_key grafana_admin_password; do
  file=$directory/$name
  if [ -s "$file" ]; then continue; fi
  # 32 random bytes; written whole or not at all
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file.new"
  chmod 444 "$file.new"
  mv "$file.new" "$file"
  echo "wrote $file"
done
