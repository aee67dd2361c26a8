#!/usr/bin/env bash
# Makes the RabbitMQ and the PostgreSQL that the tests want reachable; `make
# services`, and `make test` before anything else.
#
# They are wanted where e2e/services looks for them, and what counts as an
# answer is what its own tests say. Those that answer already are left alone.
# Missing ones are started with `docker compose` where a Docker engine runs, or
# else from the packages of Debian or Ubuntu, as root or by `sudo -n`. It never
# asks and never waits without a deadline, and it can be run any number of times.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly pull_seconds=600 # for images to be fetched
readonly start_seconds=120 # for a service to answer once it was started

say() { printf 'services: %s\n' "$*"; }
die() {
  printf 'services: %s\n' "$*" >&2
  exit 1
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# answers SERVICE: whether the tests could use it; if not, why says why not.
# CI is set, so that a missing service is a failure and not a skip.
answers() {
  local test why_not
  case $1 in
    rabbitmq) test=TestEachTestHasAPrefixOfItsOwn ;;
    postgres) test=TestEachTestHasADatabaseOfItsOwn ;;
  esac
  CI=1 "$scratch/probe" -test.v -test.timeout 30s -test.run "^$test\$" >"$scratch/answer" 2>&1 || true
  # No such test would be a success as well.
  if grep -q -e "^--- PASS: $test " "$scratch/answer"; then
    return 0
  fi
  why_not=$(sed -n 's/^[[:space:]]*Messages:[[:space:]]*\(SLUICE_[A-Z_]*: \)\{0,1\}//p' "$scratch/answer" | head -n 1)
  why=${why_not:-$(tail -n 1 "$scratch/answer")}
  return 1
}

# within SECONDS COMMAND...: ends a command that takes longer. timeout(1) is not
# everywhere.
within() {
  local deadline=$((SECONDS + $1)) pid
  shift
  "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if ((SECONDS >= deadline)); then
      kill "$pid"
      return 1
    fi
    sleep 0.2
  done
  wait "$pid"
}

docker_runs() {
  command -v docker >/dev/null && docker compose version >/dev/null 2>&1 && within 10 docker info >/dev/null 2>&1
}

start_with_docker() {
  say "starting $* with docker compose"
  within "$pull_seconds" docker compose -f docker/compose.services.yaml up --detach --quiet-pull "$@" ||
    die "docker compose could not start $*; its own words are above"
}

as_root() { if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi; }

debian_packages() {
  command -v apt-get >/dev/null && { ((EUID == 0)) || sudo -n true 2>/dev/null; }
}

# quietly COMMAND...: shows what it printed only if it failed. What it leaves
# running holds none of our pipes open: whoever reads them would wait for it.
quietly() {
  "$@" >"$scratch/output" 2>&1 || {
    cat "$scratch/output" >&2
    die "this failed: $*"
  }
}

install_package() {
  say "installing $1"
  local apt=(as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 apt-get -o DPkg::Lock::Timeout=120
    -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold)
  "${apt[@]}" update >/dev/null 2>&1 || say "the package lists could not be brought up to date; trying those that are there"
  quietly "${apt[@]}" install --yes --no-install-recommends "$1"
}

start_rabbitmq() {
  [[ -x /usr/sbin/rabbitmq-server ]] || install_package rabbitmq-server
  say "starting RabbitMQ"
  if [[ -d /run/systemd/system ]]; then
    quietly as_root systemctl start rabbitmq-server
    return
  fi
  # The name of a container is not always one that can be looked up, and a node
  # is named after it.
  local node=()
  getent hosts "$(uname -n)" >/dev/null || node=(RABBITMQ_NODENAME=rabbit@localhost)
  quietly as_root env "${node[@]}" /usr/sbin/rabbitmq-server -detached
}

# postgres_cluster: version, name and state of the one on the port of the tests.
postgres_cluster() {
  if command -v pg_lsclusters >/dev/null; then
    pg_lsclusters --no-header | awk '$3 == 5432 { print $1, $2, $4; exit }'
  fi
}

start_postgres() {
  local fresh='' version name state
  if [[ -z $(postgres_cluster) ]]; then
    install_package postgresql
    fresh=yes
  fi
  read -r version name state <<<"$(postgres_cluster)"
  [[ -n $version ]] || die "PostgreSQL is installed, but has no cluster on port 5432 (pg_lsclusters)"
  # Who may connect is not changed on a server that somebody set up for a
  # purpose of their own; one in CI has no other purpose.
  if [[ -n $fresh || -n ${CI:-} ]]; then
    trust_role_postgres "/etc/postgresql/$version/$name/pg_hba.conf"
  elif [[ $state == online* ]]; then
    die "PostgreSQL runs and does not let the tests in; let it, or name another one in SLUICE_TEST_POSTGRES_DSN: $why"
  fi
  if [[ $state == online* ]]; then
    quietly as_root pg_ctlcluster "$version" "$name" reload
  else
    say "starting PostgreSQL"
    quietly as_root pg_ctlcluster "$version" "$name" start # by systemd, where that runs
  fi
}

# trust_role_postgres FILE: postgres connects from this machine without a password.
trust_role_postgres() {
  local rule='host all postgres 127.0.0.1/32 trust # tests of Sluice, docker/services.sh'
  as_root grep -qxF "$rule" "$1" && return
  say "letting the role postgres in from this machine without a password ($1)"
  as_root sed -i "1i $rule" "$1" # the first rule that fits counts
}

# given SERVICE: the variable by which somebody named an address of their own.
given() {
  case $1 in
    rabbitmq) [[ -z ${SLUICE_TEST_AMQP_URL:-} ]] || echo SLUICE_TEST_AMQP_URL ;;
    postgres) [[ -z ${SLUICE_TEST_POSTGRES_DSN:-} ]] || echo SLUICE_TEST_POSTGRES_DSN ;;
  esac
}

go test -c -o "$scratch/probe" ./e2e/services

missing=()
for service in rabbitmq postgres; do
  if answers "$service"; then
    say "$service answers"
    continue
  fi
  [[ -z $(given "$service") ]] || die "$service does not answer where $(given "$service") says, and only its owner can start it: $why"
  missing+=("$service")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

if docker_runs; then
  start_with_docker "${missing[@]}"
elif debian_packages; then
  for service in "${missing[@]}"; do
    "start_$service"
  done
else
  die "not reachable: ${missing[*]}. Run Docker, or be root on Debian or Ubuntu, or start it yourself and name it in SLUICE_TEST_AMQP_URL, SLUICE_TEST_POSTGRES_DSN"
fi

deadline=$((SECONDS + start_seconds))
for service in "${missing[@]}"; do
  until answers "$service"; do
    ((SECONDS < deadline)) || die "$service does not answer after $start_seconds s: $why"
    sleep 0.5
  done
  say "$service answers"
done
