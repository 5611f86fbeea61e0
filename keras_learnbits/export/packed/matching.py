"""Which weight of a packed file belongs to which weight of a model."""

from keras_learnbits._keras import split_layer_name


def matched(found, names, older_names):
    """The weights of a file in the order of a model's.

    They are matched by name. The numbers at the end of layers' names may differ, if they come in
    the same order: Keras numbers the layers of a process, so that a model that is made twice has
    `dense` and `head` once, `dense_1` and `head` the other time. If no name agrees, the order
    counts. What agrees in part is not matched: a weight would go to a layer of another name.

    Args:
        found: Names of the file's weights.
        names: Names of the model's weights, as files have them.
        older_names: Names of the model's weights, as older files have them: `variable.path`.

    Returns:
        List of an index into `found` for each of `names`.

    Raises:
        ValueError: They agree in part; or all differ, and the names within layers do not agree in
            the order of the file.

    Examples:
        >>> names = ["dense/bias", "head/bias"]
        >>> matched(["head/bias", "dense_3/bias"], names, names)
        [1, 0]
    """
    for form in (list, _renumbered):
        for own in (names, older_names):
            indices = _by_name(form(found), form(own))
            if indices is not None and _agree([found[index] for index in indices], own):
                return indices
    if set(found) & {*names, *older_names}:
        raise ValueError(
            "Weights are matched by name, or in their order where all names differ. "
            f"Received: a model with {_some(set(names) - set(found))} that the file lacks, "
            f"and a file with {_some(set(found) - set(names))} that the model lacks. Give the "
            "layers the names of the file, or make the model with `load_packed_model`"
        )
    for name, *own in zip(found, names, older_names, strict=True):
        if _own_stem(name) not in map(_own_stem, own):
            raise ValueError(
                "Where all names differ, the weights of the model must be those of the file in its "
                f"order. Received: {own[0]!r} in the model, {name!r} in the file"
            )
    return list(range(len(found)))


def _own_stem(name):
    """What a weight is called in its layer, without a number."""
    return _split(name.rpartition("/")[2])[0]


def _by_name(found, names):
    """The index of each name in `found`; None if the names differ."""
    indices = {name: index for index, name in enumerate(found)}
    return [indices[name] for name in names] if indices.keys() == set(names) else None


def _agree(found, names):
    """Whether each name that is in both lists has the same index in both."""
    both = set(found) & set(names)
    return all(
        one == other or not {one, other} & both for one, other in zip(found, names, strict=True)
    )


def _renumbered(names):
    """The names with the numbers of layers replaced by their ranks among those that there are.

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
    return ["/".join([*map(renumbered, layers), own]) for *layers, own in split]


def _split(name):
    """The name of a layer without the number at its end, and the number; -1 if there is none."""
    stem, number = split_layer_name(name)
    return stem, (int(number), number) if number else (-1, "")


def _some(names):
    names = sorted(names)
    return f"{names[:4]}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
