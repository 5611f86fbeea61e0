"""Tables of docs/predictions.md: predicted and measured changes of the loss."""

from rendering.formats import markdown, study


def agreement(problem, loss):
    """How well each estimator predicts the changes of one of the losses."""
    found = study(f"agreement-{problem}")[loss]
    prices = list(found["estimators"]["measured"]["agreement_of_signs"])
    rows = [
        [
            name,
            f"{row['rank_correlation']:.2f}",
            f"{row['slope']:.2g}",
            *(f"{share:.0%}" for share in row["agreement_of_signs"].values()),
        ]
        for name, row in found["estimators"].items()
    ]
    head = ["estimator", "rank correlation", "slope", *(f"signs at {price}" for price in prices)]
    clear = f"{found['above_standard_error']} of {found['changes']} changes"
    return f"Loss of `{loss}`: {clear} exceed their standard error.\n\n{markdown(head, rows)}"


def in_short(problem, estimator, loss="fit"):
    """Rank correlation and signs of one estimator, in words."""
    row = study(f"agreement-{problem}")[loss]["estimators"][estimator]
    shares = row["agreement_of_signs"].values()
    return f"{row['rank_correlation']:.2f}, signs {min(shares):.0%} to {max(shares):.0%}"


def normalization():
    """Cost of one bit instead of two on CIFAR-10 after epoch 6, in both losses."""
    chosen = [
        change
        for change in study("agreement-cifar10")["each"]
        if (change["epoch"], change["bits"], change["step"]) == (6, 2, -1)
    ]
    rows = [
        [each["layer"], *(f"{each['measured'][loss]:+.3f}" for loss in ("evaluate", "fit"))]
        for each in chosen
    ]
    return markdown(["layer", "loss of `evaluate`", "loss of `fit`"], rows)
