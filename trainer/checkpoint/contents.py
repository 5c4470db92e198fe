"""What the tensors of a checkpoint hold, as digests. Imports no torch.

Two saves of equal state need not be equal files: the safetensors library lists the metadata of a file in any order.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path


def digests(generation: Path) -> dict[str, str]:
    """SHA-256 of dtype, shape and bytes of every stored part of a tensor, by file and name."""
    found = {}
    for path in sorted(generation.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + size])
        for name, facts in header.items():
            if name != "__metadata__":
                begin, end = facts["data_offsets"]
                content = hashlib.sha256(json.dumps([facts["dtype"], facts["shape"]]).encode())
                content.update(data[8 + size + begin : 8 + size + end])
                found[f"{path.name}: {name}"] = content.hexdigest()
    return found
