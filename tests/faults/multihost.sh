#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a veth pair, an sshd in each, `deepspeed --hostfile` over both. Trains the
# demo config there and as two ranks on one host, and compares the losses step by step.
#
#   tests/faults/multihost.sh [STEPS]      exit status 0 equal, 1 different or failed, 77 cannot be tried here
set -euo pipefail
cd "$(dirname "$0")/../.."
STEPS=${1:-60}
BIN=$PWD/.venv/bin
TOLERANCE=1e-5

skip() { echo "multihost: skipped, $1"; exit 77; }
[ "$(id -u)" = 0 ] || skip "namespaces need root"
for program in ip:iproute2 ss:iproute2 ssh-keygen:openssh-client sshd:openssh-server pdsh:pdsh; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${program%%:*}" > /dev/null || skip "${program%%:*} is missing (Debian: ${program##*:})"
done
SSHD=$(PATH=$PATH:/usr/sbin:/sbin command -v sshd)
export PATH=$PATH:/usr/sbin:/sbin

WORK=$(mktemp -d)
HOSTS=("dvasp-$$-1" "dvasp-$$-2")
MADE_RUN_SSHD=
cleanup() {
    # What runs in our namespaces is ours. KILL, because TERM would make deepspeed's pdsh runner end every deepspeed launcher of
    # this user on the machine, by name (docs/cluster.md).
    for host in "${HOSTS[@]}"; do
        if [ -e "/var/run/netns/$host" ]; then
            for pid in $(ip netns pids "$host"); do kill -KILL "$pid" 2> /dev/null || true; done
            ip netns del "$host" || true
        fi
    done
    [ -z "$MADE_RUN_SSHD" ] || rmdir /run/sshd || true
    rm -rf "$WORK"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# Two hosts, joined by one cable; each calls its end `cable`.
ip netns add "${HOSTS[0]}" 2> /dev/null && ip netns add "${HOSTS[1]}" || skip "network namespaces cannot be made here"
ip link add "v$$a" type veth peer name "v$$b" 2> /dev/null || skip "veth pairs cannot be made here"
ip link set "v$$a" netns "${HOSTS[0]}" && ip link set "v$$b" netns "${HOSTS[1]}"
for i in 1 2; do
    host=${HOSTS[$((i - 1))]}
    end=v$$a; [ $i = 1 ] || end=v$$b
    ip -n "$host" link set "$end" name cable
    ip -n "$host" addr add "10.77.0.$i/24" dev cable
    ip -n "$host" link set cable up
    ip -n "$host" link set lo up
done

# An sshd in each, with keys of their own.
if [ ! -d /run/sshd ]; then mkdir /run/sshd; MADE_RUN_SSHD=1; fi
ssh-keygen -q -t ed25519 -N '' -f "$WORK/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$WORK/user_key"
cp "$WORK/user_key.pub" "$WORK/authorized_keys"
cat > "$WORK/ssh_config" << END
Host *
    User root
    IdentityFile $WORK/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
for i in 1 2; do
    cat > "$WORK/sshd_config_$i" << END
ListenAddress 10.77.0.$i
Port 22
HostKey $WORK/host_key
AuthorizedKeysFile $WORK/authorized_keys
PidFile $WORK/sshd_$i.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
END
    # one core each, where there are two, so that both runs compute with as many threads and their losses are equal to the last bit
    cores=$(( (i - 1) % $(nproc) ))
    ip netns exec "${HOSTS[$((i - 1))]}" taskset -c "$cores" "$SSHD" -f "$WORK/sshd_config_$i"
done

SHARDS=demo/shards
if [ ! -f "$SHARDS/manifest.json" ]; then
    SHARDS=$WORK/shards
    "$BIN/python" -m data_tools.synthesize "$WORK/in.parquet" --users 3000 --items 800 --interactions 120000 --seed 1
    "$BIN/python" -m data_tools.shard "$WORK/in.parquet" "$SHARDS" --val_users 300 --test_users 600
fi
arguments() { echo launch/train.py --config configs/demo.yaml --data.shards "$SHARDS" --run.dir "$WORK/$1" --run.max_steps "$STEPS"; }

echo "multihost: $STEPS steps on two ranks of one host"
port() { "$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
DS_ACCELERATOR=cpu "$BIN/deepspeed" --num_accelerators 2 --master_port "$(port)" $(arguments one) > "$WORK/one.log" 2>&1 ||
    { tail -20 "$WORK/one.log"; exit 1; }

echo "multihost: the same on two hosts with one rank each"
printf '10.77.0.1 slots=1\n10.77.0.2 slots=1\n' > "$WORK/hostfile"
printf 'DS_ACCELERATOR=cpu\n' > "$WORK/environment" # what deepspeed sets on every host; of ours it forwards PYTHON* only
DS_ENV_FILE=$WORK/environment PDSH_SSH_ARGS_APPEND="-F $WORK/ssh_config" DS_ACCELERATOR=cpu PATH=$BIN:$PATH \
    ip netns exec "${HOSTS[0]}" setsid "$BIN/deepspeed" --hostfile "$WORK/hostfile" --no_ssh_check --master_addr 10.77.0.1 \
    $(arguments two) --parallel.interface cable > "$WORK/two.log" 2>&1 &
RUNNER=$!
listening() {
    for host in "${HOSTS[@]}"; do
        ip netns exec "$host" ss -ltnHp | awk -v host="$host" '/python/ { print "  " host " listens on " $4 }'
    done
}
while kill -0 $RUNNER 2> /dev/null; do listening; sleep 0.2; done > "$WORK/seen"
status=0; wait $RUNNER || status=$?
[ $status = 0 ] || { tail -30 "$WORK/two.log"; echo "multihost: deepspeed ended with status $status"; exit 1; }
sort -u "$WORK/seen" | tee "$WORK/listens"
[ -s "$WORK/listens" ] || { echo "multihost: no rank was seen listening"; exit 1; }
if grep -v -E ' listens on (10\.77\.0\.[12]|127\.0\.0\.1):' "$WORK/listens"; then
    echo "multihost: a rank listens on more than the interface it was given"; exit 1
fi

"$BIN/python" - "$WORK/one/metrics.jsonl" "$WORK/two/metrics.jsonl" "$STEPS" "$TOLERANCE" << 'END'
import json
import sys

losses = [{r["step"]: r["loss"] for r in map(json.loads, open(path)) if "loss" in r} for path in sys.argv[1:3]]
one, two = losses
assert sorted(one) == sorted(two) == list(range(1, int(sys.argv[3]) + 1)), (len(one), len(two))
apart = {step: abs(one[step] - two[step]) / abs(one[step]) for step in one}
for step in sorted({1, 2, len(one) // 2, len(one)}):
    print(f"  step {step:4d}: one host {one[step]:.9f}, two hosts {two[step]:.9f}, relative difference {apart[step]:.1e}")
equal = sum(one[step] == two[step] for step in one)
print(f"multihost: {len(one)} steps, {equal} equal to the last bit, largest relative difference {max(apart.values()):.1e}")
sys.exit(max(apart.values()) > float(sys.argv[4]))
END
