"""Reading a saved transcoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.files.folders import check_folder, recover
from clt_plugins.files.hub.choose import fetch_place, final_transcoder
from clt_plugins.files.hub.names import hub_place
from clt_plugins.files.records import read_json
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.model.devices import make_device
from clt_plugins.model.normalisation.stored import check_stored
from clt_plugins.model.parameters import give_memory
from clt_plugins.model.saved.bare import Make, check_sizes, without_memory
from clt_plugins.model.saved.description import FILES, Description
from clt_plugins.model.saved.other_tools import import_transcoder
from clt_plugins.model.saved.tensors import copy_tensors
from clt_plugins.registry.plugins import load_plugins

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins


def load_transcoder(
    make: Make, folder: Path, *, device: str, plugins: Plugins | None, kernels: str, lazy: bool | None
) -> Any:
    """See `CrossLayerTranscoder.load`."""
    plugins = plugins or load_plugins()
    device = str(make_device(device))
    if (place := hub_place(folder)) is not None:
        folder = final_transcoder(fetch_place(place))
    recover(folder)
    if not (folder / "transcoder.json").is_file():
        return import_transcoder(make, folder, device=device, plugins=plugins, kernels=kernels, lazy=lazy)
    # Checksums before anything is built: a truncated file must not become a transcoder that looks well.
    check_folder(folder, FILES)
    file = folder / "transcoder.json"
    stored = SlicedTensors.find(folder, "transcoder")
    description = read_json(file, Description)
    check_sizes(description, folder)
    # It is built on "meta": no memory is filled with first values that the file replaces, nor taken before the file is
    # known to have the tensors.
    transcoder = without_memory(make, description, file, device, plugins, kernels, stored)
    give_memory(transcoder, device)
    copy_tensors(stored, transcoder)
    check_stored(transcoder, folder / "transcoder.safetensors")
    return transcoder.eval()
