"""The arrays of a store: name, type and shape of each. A store is a folder of

| file | what it holds |
| --- | --- |
| `collected.json` | a `CollectionInfo` |
| `text.safetensors` | the tokens that were read, sorted by context and position; each is one row |
| `vocabulary.safetensors` | the bytes of every token that occurs in the text or among the logits |
| `features_LL.safetensors` | for each layer: statistics, examples and co-active features |
| `geometry_LL.safetensors` | for each layer: what follows from the weights; not in every store |
| `manifest.json` | size and SHA-256 of each file |

An example is a row of the text. Other features are named by one number: layer * F + feature. Both are -1 where there
are fewer than an array can hold; the value beside it is then 0.

Sizes: T tokens, V token ids that occur, L layers, F features per layer, K top examples, Q groups, E examples of each
group, X = K + Q * E examples of a feature (the top ones first, then group by group), H bins, N co-active features,
S similar features, U features by virtual weight, G logits.
"""

from __future__ import annotations

import attrs

from clt_plugins.collected.info import CollectionInfo, GeometryInfo

TEXT = "text.safetensors"
VOCABULARY = "vocabulary.safetensors"
FEATURES = "features_{:02}.safetensors"
GEOMETRY = "geometry_{:02}.safetensors"


@attrs.frozen
class Array:
    """One array of a file."""

    dtype: str
    """numpy's name of its type."""
    shape: tuple[str, ...]
    """Its sizes, by the letters above; a size that is not one of them ("n") may be any."""
    text: str
    """What it holds."""
    optional: bool = False
    """Whether it may be missing."""


ARRAYS_OF_TEXT = {
    "ids": Array("int32", ("T",), "the token's id"),
    "context": Array("int64", ("T",), "the number of its context, ascending"),
    "position": Array("int32", ("T",), "its position in the context, ascending"),
}

ARRAYS_OF_VOCABULARY = {
    "token": Array("int32", ("V",), "ids, ascending"),
    "start": Array("int64", ("V+1",), "token i has the bytes start[i] : start[i + 1]"),
    "bytes": Array("uint8", ("n",), "the bytes of all of them; one token may be a part of a character"),
}

ARRAYS_OF_FEATURES = {
    "active": Array("int64", ("F",), "at how many tokens it is active"),
    "maximum": Array("float32", ("F",), "the largest value; 0 if it is never active"),
    "minimum": Array("float32", ("F",), "the smallest value where it is active; 0 if it is never active"),
    "mean": Array("float32", ("F",), "the mean value where it is active; 0 if it is never active"),
    "histogram": Array("int64", ("F", "H"), "how many active values are in each bin of `CollectionInfo.edges`"),
    "threshold": Array("float32", ("F",), "the activation's threshold", optional=True),
    "top_row": Array("int32", ("F", "K"), "rows with the largest values, the largest first; of equal ones, the first"),
    "top_value": Array("float32", ("F", "K"), "the values there"),
    "group_row": Array("int32", ("F", "Q", "E"), "rows drawn from each group, the largest value first"),
    "group_value": Array("float32", ("F", "Q", "E"), "the values there"),
    "group_edge": Array("float32", ("F", "Q+1"), "the largest value of each group, then the smallest value of all"),
    "window_start": Array("int64", ("F+1",), "feature f has entries window_start[f] : window_start[f + 1] below"),
    "window_count": Array("int32", ("F", "X"), "how many of them each of its examples has, in turn"),
    "window_offset": Array("int16", ("n",), "an active token near the example: its row minus the example's, ascending"),
    "window_value": Array("float32", ("n",), "the feature's value there; it is 0 at all other tokens of the window"),
    "coactive": Array("int32", ("F", "N"), "features that are active where it is, the highest score first"),
    "coactive_score": Array(
        "float32", ("F", "N"), "tokens at which both are active / the geometric mean of the tokens of each"
    ),
}

ARRAYS_OF_GEOMETRY = {
    "norms": Array("float32", ("F", "L"), "norm of the decoder row of each target layer; 0 where it writes nothing"),
    "cosines": Array("float32", ("F", "L", "L"), "cosines between its decoder rows; 0 where there is none"),
    "encoder_cosine": Array("float32", ("F", "L"), "cosines of its decoder rows with its encoder row"),
    "similar": Array("int32", ("F", "S"), "features with similar decoder rows, the most similar first"),
    "similar_cosine": Array("float32", ("F", "S"), "the cosine with each"),
    "upstream": Array(
        "int32", ("F", "U"), "features of earlier layers that it reads, the weight largest in size first"
    ),
    "upstream_weight": Array("float32", ("F", "U"), "the virtual weight from each"),
    "downstream": Array("int32", ("F", "U"), "features of later layers that read it, the weight largest in size first"),
    "downstream_weight": Array("float32", ("F", "U"), "the virtual weight to each"),
    "logits_up_id": Array("int32", ("F", "L+1", "G"), "tokens that each row raises most; the last row is the sum"),
    "logits_up_value": Array("float32", ("F", "L+1", "G"), "by how much"),
    "logits_down_id": Array("int32", ("F", "L+1", "G"), "tokens that each row lowers most; the last row is the sum"),
    "logits_down_value": Array("float32", ("F", "L+1", "G"), "by how much"),
}


def sizes(info: CollectionInfo) -> dict[str, int]:
    """What the letters stand for in a store."""
    settings, geometry = info.settings, info.geometry or GeometryInfo()
    return {
        "T": info.tokens,
        "L": info.n_layers,
        "L+1": info.n_layers + 1,
        "F": info.n_features,
        "F+1": info.n_features + 1,
        "K": settings.top,
        "Q": settings.groups,
        "Q+1": settings.groups + 1,
        "E": settings.per_group,
        "X": settings.top + settings.groups * settings.per_group,
        "H": len(info.edges) - 1,
        "N": settings.coactive,
        "S": geometry.similar,
        "U": geometry.virtual,
        "G": geometry.logits,
    }


def misfit(name: str, array: Array, dtype: str, shape: tuple[int, ...], letters: dict[str, int]) -> str | None:
    """What is wrong with an array's type or shape; None if nothing is."""
    fits = len(shape) == len(array.shape) and all(
        letters.get(letter, size) == size for letter, size in zip(array.shape, shape, strict=True)
    )
    if dtype == array.dtype and fits:
        return None
    expected = "x".join(str(letters.get(letter, letter)) for letter in array.shape)
    return f"{name} is {dtype} of shape {'x'.join(map(str, shape))}, expected {array.dtype} of {expected}"
