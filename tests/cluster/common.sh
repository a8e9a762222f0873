# shellcheck shell=bash disable=SC2034
# What build, up and down share: versions, places, addresses, and a few helpers. Sourced, not run.

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

KUBERNETES=1.37.2
BIN=${PODBUILD_CACHE:-$HOME/.cache/podbuild}/kubernetes-$KUBERNETES/bin
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# RUN holds what ends with the cluster (pid files, sockets, keys, logs); STATE what needs a disk (images, volumes).
RUN=${PODBUILD_CLUSTER_RUN:-/run/podbuild-cluster}
STATE=${PODBUILD_CLUSTER_STATE:-/var/lib/podbuild-cluster}
CGROUP=$(basename "$RUN")
# Everything in the group of this name is ended by `down`: it must not be a group of somebody else's.
[[ $CGROUP == podbuild-* ]] || fail "PODBUILD_CLUSTER_RUN must be a folder whose name begins with podbuild-."

# Pods hang on a bridge of their own. Its address is where they reach the registry and the git server.
BRIDGE=podbuild0
SUBNET=10.203.64.0/20
ADDRESS=10.203.64.1
API_PORT=6443
ETCD_PORT=12379
REGISTRY=$ADDRESS:5000
GIT=$ADDRESS:5001

# Debian's own folders for programs of root are not on everyone's PATH.
PATH=$BIN:$PATH:/usr/sbin:/sbin

# The folder of our control group in each hierarchy: one with cgroup v2, one per controller with v1.
cgroup_folders() {
  local folder
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    echo "/sys/fs/cgroup/$CGROUP"
    return
  fi
  for folder in /sys/fs/cgroup/*/; do
    # v1's controllers are also there under their joint names, as links.
    if [ -e "${folder}cgroup.procs" ] && [ ! -L "${folder%/}" ]; then echo "$folder$CGROUP"; fi
  done
}

# The one among them that holds every process of the cluster, so that `down` finds each, and no other.
process_cgroup() {
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    echo "/sys/fs/cgroup/$CGROUP"
  else
    echo "/sys/fs/cgroup/pids/$CGROUP"
  fi
}

# Our firewall rules, one a line, as arguments for iptables without -A, -C or -D.
firewall_rules() {
  # Pods find the API server, which listens on loopback, at the address that their environment names.
  echo "-t nat PREROUTING -i $BRIDGE -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to-destination 127.0.0.1:$API_PORT"
  echo "-t nat POSTROUTING -s $SUBNET ! -d $SUBNET -j MASQUERADE"
  # Where Docker runs, it forwards for nobody else unless it is told to.
  echo "-t filter FORWARD -i $BRIDGE -j ACCEPT"
  echo "-t filter FORWARD -o $BRIDGE -j ACCEPT"
}

# Do one thing (-C, -I or -D) with one of these rules.
firewall() {
  local operation=$1 words
  read -ra words <<<"$2"
  iptables -w "${words[@]:0:2}" "$operation" "${words[@]:2}" 2>/dev/null
}
