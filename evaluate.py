"""How good is a segmentation network? Confusion matrix and mean IoU.

Idea
    Everything is computed from one matrix: entry (i, j) counts the pixels of class i that the
    network predicted as class j. Logits are resized to each label's own size, so the score does not
    depend on the resolution the network works at. The agreement of two networks is the same score
    with the second network's masks instead of labels.

Equation
    IoU_k = M_kk / (sum_j M_kj + sum_i M_ik - M_kk),     mIoU = mean of IoU_k
    over the classes that occur: a class that is only predicted counts as 0

Symbols
    B images, K classes, H W pixels.  M (K, K): rows are truth, columns are predictions.

Use it (all but `write_masks` and the command need torch alone)
    import torch
    from evaluate import confusion_matrix, mean_iou
    prediction, target = torch.randint(21, (2, 64, 64)), torch.randint(21, (2, 64, 64))
    miou, iou = mean_iou(confusion_matrix(prediction, target, num_classes=21))

Run it
    python evaluate.py --checkpoint runs/001/student.pt --dataset voc --data-root VOC
    python evaluate.py --checkpoint runs/001/student.pt --images photos --out masks
"""

import torch
import torch.nn.functional as F


def check_values(name, values, num_classes):
    """Raise ValueError if class numbers (n,) do not lie in 0..K-1."""
    if len(values) and not 0 <= values.min() <= values.max() < num_classes:
        raise ValueError(f"{name} values {values.min()}..{values.max()}, not 0..{num_classes - 1}")


def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Return the (K, K) int64 matrix of pixel counts; rows are truth, columns predictions.

    prediction, target: integer tensors of one shape. Pixels whose target is `ignore_index` do not
    count. ValueError if shapes differ or a value lies outside 0..K-1.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"both must have the same shape; got {prediction.shape}, {target.shape}")
    counted = target != ignore_index
    truth, guess = target[counted].long(), prediction[counted].long()              # (n,) each
    check_values("target", truth, num_classes)
    check_values("prediction", guess, num_classes)
    pairs = truth * num_classes + guess
    return pairs.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(matrix):
    """Return (mean IoU, IoU per class (K,)), float64 in [0, 1], from a confusion matrix.

    A class absent from truth and prediction is NaN and left out of the mean.
    """
    matrix = matrix.double()
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)          # 0/0 = NaN where absent
    return iou.nanmean(), iou


def predict(model, images, size):
    """Return the class of each pixel at `size` = (h, w): (B, 3, H, W) -> (B, h, w), int64.

    model: returns logits (B, K, any size), K >= 2, or {"out": logits} as torchvision's networks do.
    """
    logits = model(images)
    logits = logits["out"] if isinstance(logits, dict) else logits        # (B, K, of any size)
    return F.interpolate(logits.float(), tuple(size), mode="bilinear").argmax(dim=1)


@torch.inference_mode()
def evaluate(model, loader, num_classes, reference=None, device=None, ignore_index=255):
    """Return {"miou", "iou" (K,), "pixel_accuracy", "matrix"} of a model over a loader.

    model: from images to logits of any size, put in eval mode, as is `reference`. It may have more
    outputs than there are classes: a pixel predicted as one of the others counts as wrong.
    loader: yields (images (B, 3, H, W) float in [0, 1] or uint8, targets (B, h, w)); logits are
    resized to the targets. reference: a second model whose masks are used instead of the targets.
    The targets then only say which pixels to ignore, and may be None.
    """
    device, K = device or next(model.parameters()).device, num_classes
    model.eval()                            # a pass in training mode would change its statistics
    # Row and column K: all outputs beyond the K classes.
    matrix = torch.zeros(K + 1, K + 1, dtype=torch.int64, device=device)
    for images, targets in loader:
        images = images.to(device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        size = images.shape[-2:] if targets is None else targets.shape[-2:]
        if reference is None:
            truth = targets.to(device).long()                                      # (B, h, w)
            check_values("target", truth[truth != ignore_index], K)
        else:
            truth = predict(reference.eval(), images, size).clamp(max=K)
        if targets is not None:
            truth = truth.masked_fill(targets.to(device) == ignore_index, -1)
        prediction = predict(model, images, size).clamp(max=K)                     # (B, h, w)
        matrix += confusion_matrix(prediction, truth, K + 1, ignore_index=-1)
    matrix = matrix.cpu()
    iou = mean_iou(matrix)[1][:K]
    return {"miou": iou.nanmean().item(), "iou": iou, "matrix": matrix[:K, :K],
            "pixel_accuracy": matrix.diagonal()[:K].sum().item() / max(matrix.sum().item(), 1)}


def report(results, class_names):
    """Return a table as text: one line per class, one column per named result of `evaluate`."""
    rows = {name: [r["iou"][k] if k < len(r["iou"]) else float("nan") for r in results.values()]
            for k, name in enumerate(class_names)}
    rows["mean IoU"] = [r["miou"] for r in results.values()]
    rows["pixel accuracy"] = [r["pixel_accuracy"] for r in results.values()]
    lines = [f"{'IoU %':20s}" + "".join(f"{name:>11s}" for name in results)]
    lines += [f"{name:20s}" + "".join(f"{'-':>11s}" if value != value else f"{100 * value:11.1f}"
                                      for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def write_masks(model, folder, out, size, device):
    """Write an index PNG with a palette for every image of `folder`; return how many.

    size: (H, W) that images are resized to cover. Masks keep the image's own size and relative
    path, with the suffix .png. Unreadable files are named and skipped.
    """
    from pathlib import Path

    from support import figures, images, labelled, options
    if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise ValueError(f"--out {out} lies in the folder of the images; name another folder")
    files, written = images.find_images(folder), 0
    names = [path.relative_to(folder).with_suffix(".png") for path in files]
    if len(set(names)) < len(files):                                 # such as a.jpg and a.png
        names = [path.relative_to(folder).with_name(f"{path.name}.png") for path in files]
    own = labelled.class_colours(getattr(model, "class_names", ()))
    colours = [*own, *labelled.class_colours([])[len(own):]]         # for outputs without a name
    for path, name in zip(options.progress(files, "masks"), names, strict=True):
        try:
            image = images.load_image(path)
        except ValueError as error:
            print(f"skipped {error}")
            continue
        x = images.to_tensor(images.resize_to_cover(image, size)).unsqueeze(0)     # (1, 3, h, w)
        with torch.inference_mode():
            mask = predict(model.eval(), images.as_input(x, device), image.size[::-1])[0]  # (H, W)
        figures.save_mask(mask, Path(out) / name, colours)
        written += 1
    return written


def main(argv=None):
    """Score a checkpoint on labelled data, or write masks for a folder; return the metrics."""
    from support import checkpoint, command, labelled, options, records
    cfg = options.parse(command.Evaluation, argv, main.__doc__.split(";")[0])
    device = options.pick_device(cfg.device)
    model = checkpoint.load_model(cfg.checkpoint, cfg.model).to(device)
    size = cfg.image_size or model.image_size
    if size is None:
        raise ValueError(f"{cfg.checkpoint} does not say its image size; give --image-size")
    if cfg.images:
        if not cfg.out:
            raise ValueError("--out is missing; name a folder for the masks")
        count = write_masks(model, cfg.images, cfg.out, size, device)
        print(f"{count} masks in {cfg.out}")
        return {"masks": count}
    data = labelled.open_labelled(cfg.dataset, cfg.data_root, cfg.split, size,
                                  cfg.num_classes or model.num_classes, cfg.download)
    labelled.check_labels(data, model.class_names)
    workers = options.pick_workers(cfg.workers, device)
    loader = torch.utils.data.DataLoader(data, num_workers=workers)
    result = evaluate(model, options.progress(loader, "evaluate"), len(data.class_names))
    print(report({"model": result}, data.class_names))
    metrics = {"miou": result["miou"], "pixel_accuracy": result["pixel_accuracy"],
               "iou": records.by_name(data.class_names, result["iou"]), "config": vars(cfg)}
    if cfg.out:
        checkpoint.save_json(metrics, cfg.out)
    return metrics


if __name__ == "__main__":
    from support.options import one_sentence
    one_sentence(main)()
