#!/bin/bash
# A real SLURM on one machine, for tests: any number of pretended nodes, GPUs and CPUs, gone without a trace afterwards.
#
#   slurm_cluster.sh install                              Debian's packages, if they are missing (needs root)
#   slurm_cluster.sh install-haproxy                      the same for what stands in front of several replicas
#   slurm_cluster.sh start FOLDER NODES GPUS CPUS         per node; returns when every node is idle
#   slurm_cluster.sh stop FOLDER                          cancel what runs, stop the daemons, remove FOLDER
#
# Clients need SLURM_CONF=FOLDER/slurm.conf and nothing else. No systemd, cgroups or database; /etc/slurm is not touched,
# /etc/hosts gets one line while the cluster stands, so that the nodes' names resolve as on a real site.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
MARK="# metaseq-api test cluster"

fail() {
    echo "slurm_cluster: $*" >&2
    exit 1
}

install_packages() {
    local tool missing=0
    for tool in slurmctld slurmd munged srun; do
        command -v "$tool" >/dev/null || missing=1
    done
    [ "$missing" = 1 ] || return 0
    [ "$(id -u)" = 0 ] || fail "SLURM is not installed, and only root can install it"
    command -v apt-get >/dev/null || fail "SLURM is not installed, and there is no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null &&
        apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null ||
        fail "apt-get could not install slurmctld, slurmd, slurm-client and munge"
}

install_haproxy() {
    ! PATH=$PATH:/usr/sbin command -v haproxy >/dev/null || return 0
    [ "$(id -u)" = 0 ] || fail "HAProxy is not installed, and only root can install it"
    command -v apt-get >/dev/null || fail "HAProxy is not installed, and there is no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends haproxy >/dev/null ||
        fail "apt-get could not install haproxy"
}

# ports that are free now, next to each other: one for the controller and one per node
free_ports() {
    python3 - "$1" <<'EOF'
import contextlib, random, socket, sys

def free(port):
    with socket.socket() as s, contextlib.suppress(OSError):
        s.bind(("127.0.0.1", port))
        return True

count = int(sys.argv[1])
while True:
    first = random.randrange(12000, 30000)
    if all(free(first + i) for i in range(count)):
        print(first)
        break
EOF
}

# FOLDER: of this cluster alone. Its line becomes empty ones: a container's /etc/hosts cannot be replaced, and a file that is
# written anew is empty for a moment, in which who asks for a name beside another cluster finds none.
forget_names() {
    python3 - "$MARK $1" <<'EOF'
import fcntl, re, sys

with open("/etc/hosts", "r+b", buffering=0) as hosts:
    fcntl.flock(hosts, fcntl.LOCK_EX)
    line = rb"[^\n]*" + re.escape(sys.argv[1].encode()) + rb"\n"
    kept = re.sub(line, lambda found: b"\n" * len(found[0]), hosts.read())
    hosts.seek(0)
    hosts.write(kept)
    hosts.truncate(len(kept.rstrip(b"\n")) + 1)
EOF
}

tell_names() { # FOLDER NODES
    (
        flock 9
        echo "127.0.0.1 $(seq -s ' ' -f 'fake%g' 1 "$2") $MARK $1" >>/etc/hosts
    ) 9</etc/hosts
}

write_config() { # FOLDER NODES GPUS CPUS
    local dir=$1 nodes=$2 gpus=$3 cpus=$4 port names ports gres="" i
    port=$(free_ports $((nodes + 1)))
    names="fake[1-$nodes]" ports="[$((port + 1))-$((port + nodes))]"
    [ "$nodes" -gt 1 ] || { names=fake1 ports=$((port + 1)); }
    : >"$dir/gres.conf"
    if [ "$gpus" -gt 0 ]; then
        gres="Gres=gpu:$gpus"
        # SLURM hands out GPUs only if their files are character devices: these are further names of /dev/null
        for ((i = 0; i < gpus; i++)); do
            mknod "$dir/gpu$i" c 1 3
            echo "NodeName=$names Name=gpu File=$dir/gpu$i" >>"$dir/gres.conf"
        done
    fi
    # cred_expire: a requeued job waits until its credential has expired, two minutes by default
    # config_overrides: take the pretended number of CPUs for true
    cat >"$dir/slurm.conf" <<EOF
ClusterName=pretend
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=${KILL_WAIT:-3}
${gres:+GresTypes=gpu}
NodeName=$names NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$ports CPUs=$cpus RealMemory=4096 $gres
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
EOF
    # a second partition of the same nodes, whose jobs push those of main aside: PREEMPT=REQUEUE or CANCEL
    [ -z "${PREEMPT:-}" ] || cat >>"$dir/slurm.conf" <<EOF
PreemptType=preempt/partition_prio
PreemptMode=$PREEMPT
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
EOF
    [ -z "${GRACE_TIME:-}" ] || sed -i "/^PartitionName=main /s/$/ GraceTime=$GRACE_TIME/" "$dir/slurm.conf"
}

start() { # FOLDER NODES GPUS CPUS
    local dir=$1 nodes=$2 i
    [ "$(id -u)" = 0 ] || fail "only root can make the device files of pretended GPUs"
    mkdir -p "$dir"/{state,munge}
    chmod 755 "$dir" "$dir/munge"
    write_config "$@"
    export SLURM_CONF=$dir/slurm.conf
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" 2>>"$dir/munged.log" || fail "$(tail -3 "$dir/munged.log")"
    tell_names "$dir" "$nodes"
    slurmctld -c -i >>"$dir/slurmctld.log" 2>&1 || fail "$(tail -3 "$dir/slurmctld.log")"
    for ((i = 1; i <= nodes; i++)); do
        slurmd -N "fake$i" >>"$dir/slurmd-fake$i.log" 2>&1 || fail "$(tail -3 "$dir/slurmd-fake$i.log")"
    done
    for ((i = 0; i < 300; i++)); do
        [ "$(sinfo -h -N -p main -o %T 2>/dev/null | grep -c '^idle$' || true)" != "$nodes" ] || return 0
        sleep 0.1
    done
    fail "the nodes did not become idle: $(sinfo -h -N -o '%N %T' 2>&1 | tr '\n' ' ')"
}

end_daemons() { # PID_FILE...
    local file pid pids=() i
    for file in "$@"; do
        [ ! -s "$file" ] || pids+=("$(cat "$file")")
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        kill -TERM "$pid" 2>/dev/null || true
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        for ((i = 0; i < 160; i++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.05
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

stop() { # FOLDER
    local dir=$1 i
    [ -e "$dir/slurm.conf" ] || return 0
    export SLURM_CONF=$dir/slurm.conf
    if scancel --quiet --user "$(id -un)" 2>/dev/null; then
        for ((i = 0; i < 100; i++)); do
            [ -n "$(squeue -h -o %i 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    end_daemons "$dir"/slurmd-*.pid "$dir/slurmctld.pid"
    end_daemons "$dir/munged.pid"
    forget_names "$dir"
    rm -rf "$dir"
}

case ${1:-} in
install) (flock 9 && install_packages) 9<"$0" ;; # one at a time: of two apt-gets one fails
install-haproxy) (flock 9 && install_haproxy) 9<"$0" ;;
start) start "${@:2}" ;;
stop) stop "$2" ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
