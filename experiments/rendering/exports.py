"""Tables of docs/exports.md: sizes, latencies, and what to call."""

from rendering.formats import markdown, study


def sizes(program):
    found = study(f"exports-{program}")
    rows = []
    for name, size in found["bytes"].items():
        predicted = name in found["largest_difference"]
        rows.append(
            [
                name,
                f"{size:,}",
                f"{size / found['bytes']['float .keras']:.1%}",
                f"{found['test_accuracy'][name]:.2%}" if predicted else "",
                f"{found['largest_difference'][name]:.1e}" if predicted else "",
            ]
        )
    head = ["file", "bytes", "of float", "test accuracy", "largest difference"]
    return (
        f"`{found['command']}`: the model has {found['test_accuracy']['model']:.2%} at "
        f"{found['mean_bits']:.2f} mean bits, and outputs up to {found['largest_output']:.1f}.\n\n"
        + markdown(head, rows)
    )


def latencies():
    found = study("latency")
    floats = {
        (row["net"], row["runtime"]): row["bytes"]
        for row in found["rows"]
        if row["file"] == "float"
    }
    rows = [
        [
            row["net"],
            row["runtime"],
            row["file"],
            f"{row['bytes']:,}",
            f"{row['bytes'] / floats[row['net'], row['runtime']]:.0%}",
            *(f"{row['milliseconds'][size]:.2f}" for size in ("1", "32")),
            *(f"{row['ratio'][size]:.2f}" for size in ("1", "32")),
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in found["rows"]
    ]
    head = ["net", "runtime", "file", "bytes", "of float", "batch 1 [ms]", "batch 32 [ms]",
            "of float, batch 1", "of float, batch 32", "difference"]  # fmt: skip
    return f"`{found['command']}`\n\n{markdown(head, rows)}"


def spread(runtime, file, nets=None):
    """The lowest and the highest ratio to the float file, over nets and batches."""
    found = study("latency")
    ratios = [
        ratio
        for row in found["rows"]
        if (row["runtime"], row["file"]) == (runtime, file) and (not nets or row["net"] in nets)
        for ratio in row["ratio"].values()
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def decisions():
    activations = 'arithmetic="int8", activations=True'
    rows = [
        ["LiteRT, on a phone or a server", '`export_litert(model, path, arithmetic="int8")`',
         "1; 0.5 for dense layers of up to 3 bits", spread("LiteRT", 'arithmetic="int8"')],
        ["LiteRT, with the model's exact predictions", "`export_litert(model, path)`", "1",
         spread("LiteRT", 'arithmetic="float"')],
        ["LiteRT, in integers throughout", "`to_learned_bits(..., activations=True)`, train, "
         '`export_litert(model, path, arithmetic="int8")`', "1", spread("LiteRT", activations)],
        ["onnxruntime", "`export_onnx(model, path)`", "0.25, 0.5 or 1",
         spread("onnxruntime", 'arithmetic="float"')],
        ["onnxruntime, in integers", "`to_learned_bits(..., activations=True)`, train, "
         '`export_onnx(model, path, arithmetic="int8")`', "1; 4 where it stays float",
         spread("onnxruntime", activations)],
        ["OpenVINO", "`export_onnx(model, path, opset=21)`", "0.5 or 1",
         spread("OpenVINO", 'arithmetic="float"')],
        ["OpenVINO, in integers", "as for onnxruntime", "1; 4 where it stays float",
         spread("OpenVINO", activations)],
        ["TFLite Micro", "LiteRT's own full-integer conversion of `to_keras(model)`", "1", ""],
        ["FPGAs, through hls4ml", "`quantize(..., activations=True, power_of_two=True)`, "
         "`export_hls4ml(model, directory)`", "bits / 8", ""],
        ["other compilers", "`export_qonnx(model, path)`", "4; the graph has the widths", ""],
        ["Keras, or an archive", "`save_packed(model, path)`", "bits / 8", ""],
    ]  # fmt: skip
    return markdown(["it runs in", "call", "bytes per weight", "latency, of float"], rows)
