"""The same job on 1, 2 and 4 processes and on two "hosts": network namespaces joined by a cable, a torchrun
in each.

    sudo python experiments/hosts.py            # needs root and the `ip` tool; two minutes

All must have the losses of a single process on the same global batch. The commands are those for real hosts
(see README), each host with an address of its own; gloo is told which interface to use.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"ivr-a": "10.77.0.1", "ivr-b": "10.77.0.2"}
JOB = ("--model tiny --data tiny:steps=5 --batch 4 --group_size 4 --max_steps 3 --rectify_below 1 --lr 1e-4 "
       "--eval_problems 0 --print_every 0 --trace_every 0 --device cpu").split()


def ip(words: str, must: bool = True):
    subprocess.run(["ip", *words.split()], check=must, capture_output=not must)


def cable():
    """Two namespaces, a virtual cable between them, an address at either end."""
    for name in HOSTS:
        ip(f"netns add {name}")
    a, b = HOSTS
    ip(f"link add cable-a netns {a} type veth peer name cable-b netns {b}")
    for (name, address), end in zip(HOSTS.items(), ("cable-a", "cable-b")):
        ip(f"-n {name} addr add {address}/24 dev {end}")
        ip(f"-n {name} link set {end} up")
        ip(f"-n {name} link set lo up")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(commands: list, names: list):
    """Run commands side by side to their end; what they say is shown where one fails."""
    jobs = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env={**os.environ, "OMP_NUM_THREADS": "1", **({"GLOO_SOCKET_IFNAME": name}
                                                                          if name else {})})
            for command, name in zip(commands, names)]
    said = [job.communicate(timeout=400)[0] for job in jobs]
    if any(job.returncode for job in jobs):
        sys.exit("\n".join(text[-3000:] for text in said))


def two_hosts(out: str, *flags):
    """The job with one process in each namespace."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--rdzv_backend", "c10d", "--rdzv_id", "ivr", "--rdzv_endpoint", f"{HOSTS['ivr-a']}:29500"]
    try:
        cable()
        run([["ip", "netns", "exec", name, *torchrun, "--rdzv_conf", f"is_host={int(name == 'ivr-a')}",
              "--local_addr", address, "train.py", *JOB, "--out", out, *flags]
             for name, address in HOSTS.items()], ["cable-a", "cable-b"])
    finally:
        for name in HOSTS:
            ip(f"netns del {name}", must=False)


def main():
    with tempfile.TemporaryDirectory() as folder:
        run([[sys.executable, "train.py", *JOB, "--out", f"{folder}/1 process"]], [""])
        for flags, name in (((), ""), (("--balance", "queue"), ", queue")):
            for n in (2, 4):
                run([[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                      str(n), "train.py", *JOB, "--out", f"{folder}/{n} processes{name}", *flags]], [""])
            two_hosts(f"{folder}/2 hosts{name}", *flags)
        first, worst = losses(Path(folder) / "1 process"), 0.0
        for out in sorted(Path(folder).iterdir()):
            gap = max(abs(a - b) for a, b in zip(first, losses(out), strict=True))
            worst = max(worst, gap)
            print(f"{out.name:18} losses {', '.join(f'{x:.6f}' for x in losses(out))}  off by {gap:.1e}")
        sys.exit(0 if worst < 1e-4 else 1)


if __name__ == "__main__":
    main()
