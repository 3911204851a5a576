#!/usr/bin/env bash
# What the tests of the containers need, made on this machine:
#
#   engine.sh start   a Docker engine, unless one answers (as root, from Debian's docker.io)
#   engine.sh image   the image of deploy/Dockerfile as $IMAGE
#   engine.sh stop    end the engine that `start` started; one that was there stays
#
# No registry is needed: where debootstrap is installed, the image below is a Debian made with it
# (CONSILIUM_BASE=... names another). PyTorch is the wheel that this machine's pip finds, or what
# TORCH_INDEX says. pip inside the build uses this machine's index and certificates; they are
# mounted for single commands, and stay in no layer.
set -euo pipefail
cd "$(dirname "$0")/../.."

IMAGE="${CONSILIUM_IMAGE:-consilium-test}"
WORK="${CONSILIUM_ENGINE:-/var/tmp/consilium-engine}"
BUILD=build/containers
BASE_MADE=consilium-base:bookworm
PY="${PY:-.venv/bin/python}"

fail() { # what is wrong, what to do
	echo "error: $1" >&2
	echo "what to do: $2" >&2
	exit 1
}

# A `docker` that builds with BuildKit: by itself up to version 22, with the plugin buildx since.
client() {
	local candidate major
	for candidate in docker /usr/bin/docker; do
		command -v "$candidate" >/dev/null || continue
		major=$("$candidate" --version | sed -E 's/[^0-9]*([0-9]+).*/\1/')
		if [ "$major" -lt 23 ] || "$candidate" buildx version >/dev/null 2>&1; then
			echo "$candidate"
			return
		fi
	done
	fail "there is no docker client that can build" "install docker with buildx, or Debian's docker.io"
}

start() {
	if docker info >/dev/null 2>&1; then
		return
	fi
	command -v dockerd >/dev/null || fail "no Docker engine answers, and none is installed" \
		"apt-get install docker.io docker-compose debootstrap, or start Docker"
	[ "$(id -u)" = 0 ] || fail "no Docker engine answers, and only root can start one" "start Docker"
	mkdir -p -m 700 "$WORK"
	nohup dockerd --data-root "$WORK/data" --exec-root "$WORK/exec" --pidfile "$WORK/pid" \
		>"$WORK/log" 2>&1 &
	for _ in $(seq 60); do
		if docker info >/dev/null 2>&1; then
			return
		fi
		sleep 0.5
	done
	fail "dockerd did not start within 30 s" "read $WORK/log"
}

stop() {
	if [ -f "$WORK/pid" ]; then
		kill "$(cat "$WORK/pid")"
	fi
}

# The image below: Debian with Python 3.11, 190 MB, made once in 40 s.
base() {
	if [ -n "${CONSILIUM_BASE:-}" ]; then
		echo "$CONSILIUM_BASE"
	elif docker image inspect "$BASE_MADE" >/dev/null 2>&1; then
		echo "$BASE_MADE"
	elif command -v debootstrap >/dev/null && [ "$(id -u)" = 0 ]; then
		local root
		root=$(mktemp -d)
		debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
			bookworm "$root" >&2
		rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
		tar -C "$root" -c . | docker import - "$BASE_MADE" >&2
		rm -rf --one-file-system "$root"
		echo "$BASE_MADE"
	else
		echo python:3.11-slim
	fi
}

# PyTorch's wheel as this machine's pip has it, as an image of that one file.
wheels() {
	if ! ls "$BUILD"/wheels/torch-2.13.0*.whl >/dev/null 2>&1; then
		mkdir -p "$BUILD/wheels"
		"$PY" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.11 \
			--dest "$BUILD/wheels" "torch==2.13.0" >&2
	fi
	docker image inspect consilium-wheels:local >/dev/null 2>&1 \
		|| tar -C "$BUILD/wheels" -c . | docker import - consilium-wheels:local >&2
	echo consilium-wheels:local
}

image() {
	local builder secrets certificates index
	builder=$(client)
	secrets=$(mktemp -d)
	# shellcheck disable=SC2064  # the folder's name as it is now
	trap "rm -rf '$secrets'" EXIT
	certificates=$("$PY" -m pip config get :env:.cert 2>/dev/null \
		|| "$PY" -m pip config get global.cert 2>/dev/null || true)
	index=$("$PY" -m pip config get :env:.index-url 2>/dev/null \
		|| "$PY" -m pip config get global.index-url 2>/dev/null || true)
	echo "[global]" >"$secrets/pip.conf"
	set -- --secret "id=pip.conf,src=$secrets/pip.conf"
	if [ -f "$certificates" ]; then
		echo "cert = /run/secrets/ca.crt" >>"$secrets/pip.conf"
		set -- "$@" --secret "id=ca.crt,src=$certificates"
	fi
	if [ -n "$index" ]; then
		echo "index-url = $index" >>"$secrets/pip.conf"
	fi
	set -- "$@" --build-arg "BASE=$(base)"
	if [ -n "${TORCH_INDEX:-}" ]; then
		set -- "$@" --build-arg "TORCH_INDEX=$TORCH_INDEX"
	else
		set -- "$@" --build-arg "WHEELS=$(wheels)"
	fi
	DOCKER_BUILDKIT=1 nice "$builder" build --file deploy/Dockerfile --tag "$IMAGE" "$@" .
}

case "${1:-}" in
start | image | stop) "$1" ;;
*) fail "engine.sh ${1:-} is unknown" "use start, image or stop" ;;
esac
