"""Matches the weights of a packed file with those of a model."""

from keras_learnbits._keras import split_layer_name


def matched(found, names, older_names):
    """For each weight of a model, the index of its weight in a file.

    Weights are matched by name. The numbers at the end of layers' names may differ if they have the
    same order: Keras numbers layers through a process, so a model that is made twice has layers
    `dense` and `head` first, and `dense_1` and `head` the second time. If no name is equal, the
    weights are matched in order. If only some names are equal, nothing is matched, because a weight
    might go to another layer.

    Args:
        found: List of the names of the file's weights.
        names: List of the names of the model's weights in files.
        older_names: List of the names of the model's weights in older files: `variable.path`.

    Returns:
        List of an index into `found` for each of `names`.

    Raises:
        ValueError: Only some names are equal; or no names are, and the names of weights within
            their layers differ in the order of the file.

    Examples:
        >>> names = ["dense/bias", "head/bias"]
        >>> matched(["head/bias", "dense_3/bias"], names, names)
        [1, 0]
    """
    # Exact names first, then numbers by rank; current names first, then those of older files.
    for form in (list, _renumbered):
        for model_names in (names, older_names):
            indices = _by_name(form(found), form(model_names))
            if indices is not None and _agree([found[i] for i in indices], model_names):
                return indices
    if set(found) & {*names, *older_names}:
        raise ValueError(
            "Weights are matched by name, or in their order where all names differ. "
            f"Received: a model with {_some(set(names) - set(found))} that the file lacks, "
            f"and a file with {_some(set(found) - set(names))} that the model lacks. Give the "
            "layers the names of the file, or make the model with `load_packed_model`"
        )
    for name, *model_names in zip(found, names, older_names, strict=True):
        if _stem_in_layer(name) not in map(_stem_in_layer, model_names):
            raise ValueError(
                "Where all names differ, the weights of the model must be those of the file in its "
                f"order. Received: {model_names[0]!r} in the model, {name!r} in the file"
            )
    return list(range(len(found)))


def _stem_in_layer(name):
    """The name of a weight within its layer, without a number."""
    return _split(name.rpartition("/")[2])[0]


def _by_name(found, names):
    """The index of each name in `found`; None if the names differ."""
    indices = {name: index for index, name in enumerate(found)}
    return [indices[name] for name in names] if indices.keys() == set(names) else None


def _agree(found, names):
    """Whether each name that is in both lists has the same index in both.

    With numbers by rank, `dense_1` of the file could otherwise be matched with `dense_2` of a model
    that has a `dense_1` as well.
    """
    both = set(found) & set(names)
    return all(
        one == other or not {one, other} & both for one, other in zip(found, names, strict=True)
    )


def _renumbered(names):
    """The names with the number of each layer replaced by its rank among those of its stem.

    Examples:
        >>> _renumbered(["dense_4/bias", "dense_7/bias", "head/bias"])
        ['dense 0/bias', 'dense 1/bias', 'head 0/bias']
    """
    numbers = {}
    for name in names:
        for stem, number in map(_split, name.split("/")[:-1]):
            numbers.setdefault(stem, set()).add(number)
    ranks = {stem: sorted(found) for stem, found in numbers.items()}

    def renumbered(layer):
        stem, number = _split(layer)
        return f"{stem} {ranks[stem].index(number)}"

    split = [name.split("/") for name in names]
    return ["/".join([*map(renumbered, layers), weight]) for *layers, weight in split]


def _split(name):
    """The name of a layer without its number, and a key that sorts by the number."""
    stem, number = split_layer_name(name)
    # The string distinguishes `dense_1` from `dense_01`; a layer without a number is the first.
    return stem, (int(number), number) if number else (-1, "")


def _some(names):
    names = sorted(names)
    return f"{names[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
