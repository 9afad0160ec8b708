"""Three schedulers that lower a learning rate when a metric stalls, written out from their sources.

PyTorch 2.13 `torch.optim.lr_scheduler.ReduceLROnPlateau.step`, Keras 3 `ReduceLROnPlateau.on_epoch_end` and
optax 0.2.8 `contrib.reduce_on_plateau`, for metrics that are to be small. `improves(x, best)` is given, as
the originals' relative rule takes worse negative metrics for better ones. Each returns the scale after each
metric.
"""


def torch(metrics, improves, *, factor, patience, cooldown, lowest):
    best, bad, cooling, scale, scales = float("inf"), 0, 0, 1.0, []
    for x in metrics:
        if improves(x, best):
            best, bad = x, 0
        else:
            bad += 1
        if cooling > 0:
            cooling -= 1
            bad = 0
        if bad > patience:
            scale = max(scale * factor, lowest)
            cooling, bad = cooldown, 0
        scales.append(scale)
    return scales


def keras(metrics, improves, *, factor, patience, cooldown, lowest):
    best, wait, cooling, scale, scales = float("inf"), 0, 0, 1.0, []
    for x in metrics:
        if cooling > 0:
            cooling -= 1
            wait = 0
        if improves(x, best):
            best, wait = x, 0
        elif not cooling > 0:
            wait += 1
            if wait >= patience and scale > lowest:
                scale = max(scale * factor, lowest)
                cooling, wait = cooldown, 0
        scales.append(scale)
    return scales


def optax(metrics, improves, *, factor, patience, cooldown, lowest):
    best, count, cooling, scale, scales = float("inf"), 0, 0, 1.0, []
    for x in metrics:
        improved = improves(x, best)
        best = x if improved else best
        current = 0 if improved else count + 1
        if cooling > 0:
            count, cooling = 0, cooling - 1
        elif current == patience:
            scale = max(scale * factor, lowest)
            count, cooling = 0, cooldown
        else:
            count = current
        scales.append(scale)
    return scales
