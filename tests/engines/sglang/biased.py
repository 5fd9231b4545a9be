"""Run by the engine's Python: a copy of a model whose routers choose the first half of the experts for every token.

Takes the model's directory and the copy's. Of each two of those experts one's score is the other's with its sign
turned, and the other half's is 0: half of the first half is above, which is as many as a token has.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    model, copy = map(Path, sys.argv[1:])
    shutil.copytree(model, copy)
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        for name, gate in tensors.items():
            if name.endswith("mlp.gate.weight"):
                half = len(gate) // 2
                gate[1:half:2] = -gate[0:half:2]
                gate[half:] = 0
        save_file(tensors, path, metadata={"format": "pt"})
        assert any(torch.equal(gate[0], -gate[1]) for name, gate in tensors.items() if name.endswith("gate.weight"))


if __name__ == "__main__":
    main()
