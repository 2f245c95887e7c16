"""How good is a segmentation network? Confusion matrix and mean IoU.

Idea
    Everything is read off one matrix: entry (i, j) counts the pixels of class i that the network
    called j. The logits are resized to each label's own size, so that the score does not depend on
    the resolution the network works at. Agreement is the same with another network's masks in the
    place of the labels.

Equation
    IoU_k = M_kk / (sum_j M_kj + sum_i M_ik - M_kk),     mIoU = mean of IoU_k over present classes

Symbols
    B images, K classes, H W pixels.  M (K, K): rows are truth, columns are predictions.

Use it
    from evaluate import confusion_matrix, mean_iou
    miou, iou = mean_iou(confusion_matrix(prediction, target, num_classes=21))

Run it
    python evaluate.py --checkpoint runs/NAME/student.pt --dataset camvid --data-root DIR
    python evaluate.py --checkpoint runs/NAME/student.pt --images DIR --out masks/
"""

import torch
import torch.nn.functional as F


def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Return the (K, K) int64 matrix of pixel counts; rows are truth, columns predictions.

    prediction, target: integer tensors of one shape. Pixels whose target is `ignore_index` do not
    count. Raises ValueError if shapes differ or a value lies outside 0..K-1.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
                         "must have the same shape")
    keep = target != ignore_index
    truth, guess = target[keep].long(), prediction[keep].long()                    # (n,) each
    for name, values in (("target", truth), ("prediction", guess)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name} values must lie in 0..{num_classes - 1} (or be the ignored "
                             f"{ignore_index}); got {values.min()}..{values.max()}; labels must "
                             "have the classes of the network")
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


def summary(matrix):
    """Return the dict of metrics of a confusion matrix."""
    miou, iou = mean_iou(matrix)
    total = max(matrix.sum().item(), 1)
    return {"miou": miou.item(), "iou": iou, "matrix": matrix,
            "pixel_accuracy": matrix.diagonal().sum().item() / total}


@torch.inference_mode()
def evaluate(model, loader, num_classes, reference=None, device=None, ignore_index=255):
    """Return the `summary` of a model over labelled images: `miou`, `iou` (K,), `matrix` and more.

    model: from images to logits (B, K, of any size), put in eval mode, as is `reference`; networks
    of another kind: `models.wrap`.
    loader: yields (images (B, 3, H, W) float in [0, 1] or uint8, targets (B, h, w)); logits are
    resized to the targets. reference: a second model that takes the place of the targets; the
    loader's are then only read where they say `ignore_index`, and may be None.
    """
    for network in (model, reference):
        if getattr(network, "training", False):
            network.eval()                  # a pass in training mode would change its statistics
    device = device or next(model.parameters()).device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, targets in loader:
        images = as_input(images, device)
        size = images.shape[-2:] if targets is None else targets.shape[-2:]
        prediction = predict(model, images, size)
        if reference is not None:
            agreed = predict(reference, images, size)
            if targets is not None:
                agreed[targets.to(device) == ignore_index] = ignore_index
            targets = agreed
        matrix += confusion_matrix(prediction, targets.to(device), num_classes, ignore_index)
    return summary(matrix.cpu())


def as_input(images, device):
    """Return images on the device as float32 in [0, 1], from uint8 or from float."""
    images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def predict(model, images, size):
    """Return the class of each pixel at `size` = (h, w): (B, 3, H, W) -> (B, h, w), int64."""
    logits = model(images)                                                # (B, K, of any size)
    return F.interpolate(logits.float(), tuple(size), mode="bilinear").argmax(dim=1)


def named_iou(result, class_names):
    """Return {class: IoU}, None where a class is absent: JSON knows no NaN."""
    return {name: None if iou != iou else iou
            for name, iou in zip(class_names, result["iou"].tolist(), strict=True)}


def report(results, class_names):
    """Return a table as text: a line per class, a column per named result of `evaluate`."""
    rows = {name: [r["iou"][k] for r in results.values()] for k, name in enumerate(class_names)}
    rows["mean IoU"] = [r["miou"] for r in results.values()]
    rows["pixel accuracy"] = [r["pixel_accuracy"] for r in results.values()]
    lines = [f"{'IoU %':20s}" + "".join(f"{name:>11s}" for name in results)]
    lines += [f"{name:20s}" + "".join(f"{'-':>11s}" if value != value else f"{100 * value:11.1f}"
                                      for value in values) for name, values in rows.items()]
    return "\n".join(lines)


def main(argv=None):
    """Score a checkpoint on labelled data, or write masks for a folder; return the metrics."""
    from support.evaluation import main  # here, so that the functions above need torch alone
    return main(argv)


if __name__ == "__main__":
    from support.options import one_sentence
    one_sentence(main)()
