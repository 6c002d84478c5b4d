"""Trains the mini-LLaVA from scratch on generated scenes.

Stage 1 teaches the vision tower what lies in each patch's cell (the stand-in for CLIP's pre-training). Stage 2 trains
tower, projector and language model together on questions, dialogues and captions, many per picture. The language model
starts shallow, which makes a step several times cheaper while the tasks are found, and grows to its depth later.
The checkpoint is exported to ``model/`` at every evaluation, and training goes on from ``--checkpoint`` where that file
exists.

    python train.py                      # about 110 minutes on two cores; a GPU is used if there is one (not tried)
    python train.py --minutes 66         # stage 2 by the clock: the schedule ends after 66 minutes, whatever the speed
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from architecture import export, make_config
from forward import GroundHead, PatchHeads, compile_block, forward, vision_features
from packing import Batch, Packed, Patches, collate, pixels, sample
from scenes import TASKS, make_scene
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
VALIDATION_SEED = 1_000_000  # held-out scenes that neither training nor eval.py touches
PATCH_LOSS_WEIGHT = 0.1  # of stage 1's loss while stage 2 runs, on features and visual tokens
GROUND_LOSS_WEIGHT = 0.3
LONGEST_STEP = 20.0  # seconds; what a step takes longer, the process was stopped


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE / "model", help="folder of the exported checkpoint")
    p.add_argument("--checkpoint", type=Path, default=HERE / "train-checkpoint.pt", help="state to resume from")
    p.add_argument("--hidden", type=int, default=96, help="width of the language model, a multiple of 32")
    p.add_argument("--layers", type=int, default=32, help="decoder layers")
    p.add_argument("--patch", type=int, default=6, help="pixels a side of a visual token, a divisor of 96")
    p.add_argument("--start-layers", type=int, default=4, help="decoder layers before it grows, a divisor of --layers")
    p.add_argument("--grow-at", type=float, default=0.4, help="share of stage 2 after which it grows to --layers")
    p.add_argument("--vision-steps", type=int, default=1000, help="steps of stage 1")
    p.add_argument("--vision-batch", type=int, default=32, help="pictures a step in stage 1")
    p.add_argument("--steps", type=int, default=7500, help="steps of stage 2")
    p.add_argument("--minutes", type=float, help="length of stage 2 by the clock, instead of --steps")
    p.add_argument("--batch", type=int, default=6, help="pictures a step in stage 2")
    p.add_argument("--lr", type=float, default=1.5e-3, help="peak rate of AdamW")
    p.add_argument("--eval-minutes", type=float, default=5.0, help="time between evaluations, saves and exports")
    p.add_argument("--workers", type=int, default=1, help="processes that draw scenes; about 8 for a GPU")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    p.add_argument("--compile", action="store_true", help="compile the decoder layer: a fifth less time on a CPU, needs a C++ compiler")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights; scenes are numbered from 0 regardless")
    return p.parse_args()


def make_model(hidden: int, layers: int, patch: int, seed: int) -> LlavaForConditionalGeneration:
    """Fresh weights.

    Matrices have unit gain and what is added to the residual stream is scaled by depth: Hugging Face's standard
    deviation of 0.02 is far too small for a width of 128 and 16 layers.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config(hidden=hidden, layers=layers, patch=patch))
    lm = model.model.language_model
    torch.nn.init.normal_(lm.embed_tokens.weight, std=0.5)
    for layer in lm.layers:
        for name, p in layer.named_parameters():
            if p.dim() == 2:
                gain = (2 * layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                torch.nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return model


@torch.no_grad()
def grown(model: LlavaForConditionalGeneration, layers: int) -> LlavaForConditionalGeneration:
    """The model with each layer split into copies of itself that add a share each.

    So neighbours begin with the same attention, as those of large models have nearly the same. Fresh layers between the old
    ones were tried, with a small output and with none: their attention was hardly needed or not at all, and a model whose
    attention can be dropped cannot show what sharing it costs.

    Args:
        model: the model; left as it is.
        layers: number of decoder layers, a multiple of the model's.
    """
    old = model.model.language_model.layers
    copies = layers // len(old)
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * layers
    result = LlavaForConditionalGeneration(config).to(next(model.parameters()).device).train(model.training)
    kept = {name: value for name, value in model.state_dict().items() if "language_model.layers." not in name}
    result.load_state_dict(kept, strict=False)
    for i, layer in enumerate(result.model.language_model.layers):
        layer.load_state_dict(old[i // copies].state_dict())
        layer.self_attn.o_proj.weight.div_(copies)
        layer.mlp.down_proj.weight.div_(copies)
    return result


def make_optimizers(parts: list[tuple[torch.nn.Module, float]], lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; only the matrices inside layers and projector decay.

    Muon at 0.02 was tried and failed: nothing bounds the norms, the projector's output grew to hundreds of times the text
    embeddings, and shapes were not learned in 3,600 steps. AdamW learns them within 1,200.

    Args:
        parts: modules, each with a factor on the rate.
        lr: peak rate.
    """
    optimizers = []
    for module, factor in parts:
        matrices, rest = [], []
        for name, p in module.named_parameters():
            inner = p.dim() == 2 and ("layers." in name or name.startswith("linear_"))
            (matrices if inner else rest).append(p)
        if matrices:
            optimizers.append(torch.optim.AdamW(matrices, lr=factor * lr, betas=(0.9, 0.95), weight_decay=0.1))
        optimizers.append(torch.optim.AdamW(rest, lr=factor * lr, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, progress: float) -> None:
    """A short warm-up, a constant rate for half of the time, then linearly to zero."""
    factor = min(1.0, (step + 1) / 100, 2.0 * (1.0 - progress))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * max(factor, 0.0)


def apply_gradients(params: list[torch.nn.Parameter], shares: list[tuple], optimizers) -> None:
    """One optimizer step.

    Args:
        params: everything that is trained.
        shares: for each part of the batch one gradient per parameter, None where the loss doesn't reach it.
        optimizers: the optimizers of ``params``.
    """
    for p, *grads in zip(params, *shares):
        known = [g for g in grads if g is not None]
        p.grad = torch.stack(known).sum(0) if known else torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def validate(model, batches: list[Batch], autocast) -> dict[str, float]:
    """Share of exactly right answers by task, teacher-forced, which for exact matches equals greedy decoding."""
    right = dict.fromkeys(TASKS, 0)
    asked = dict.fromkeys(TASKS, 0)
    for batch in batches:
        with autocast():
            logits, chosen, *_ = forward(model, batch)
        hit = logits.argmax(-1) == batch.targets[chosen]
        sample_of = torch.arange(len(batch.tokens), device=hit.device)[:, None, None].expand_as(chosen)[chosen]
        answer = sample_of * 1000 + batch.turns[chosen]
        for i, task in enumerate(TASKS):
            mine = batch.tasks[chosen] == i
            ids, slot = answer[mine].unique(return_inverse=True)
            misses = torch.zeros(len(ids), device=hit.device).index_add_(0, slot, (~hit[mine]).float())
            right[task] += int((misses == 0).sum())
            asked[task] += len(ids)
    return {task: right[task] / max(1, asked[task]) for task in TASKS}


class Run:
    """Training state. Stage 2 survives an interruption: weights, optimizers, step and seconds spent."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = make_model(args.hidden, args.start_layers, args.patch, args.seed).to(self.device).train()
        self.heads = PatchHeads(model.config.vision_config.hidden_size).to(self.device)
        self.kept = PatchHeads(args.hidden).to(self.device)
        self.ground = GroundHead(args.hidden).to(self.device)
        # on a CPU each thread takes a part of the batch: layers this small gain little from threads inside a product,
        # and lose much where another process delays one of them
        self.n_parts = args.threads if self.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.n_parts, initializer=torch.set_num_threads, initargs=(1,))
        self.step, self.seconds = 0, 0.0
        self.use(model)

    def use(self, model: LlavaForConditionalGeneration) -> None:
        """Trains this model from now on, with fresh optimizers."""
        args = self.args
        self.model = model
        self.tower = model.model.vision_tower
        self.params = [*model.parameters(), *self.heads.parameters(), *self.kept.parameters(), *self.ground.parameters()]
        self.optimizers = make_optimizers(
            [
                (self.tower, 0.3),  # stage 1 has taught it most
                (self.heads, 0.3),
                (self.kept, 1.0),
                (self.ground, 1.0),
                (self.model.model.multi_modal_projector, 1.0),
                (self.model.model.language_model, 1.0),
                (self.model.lm_head, 1.0),
            ],
            args.lr,
        )

    @property
    def n_layers(self) -> int:
        return len(self.model.model.language_model.layers)

    def autocast(self):
        """bfloat16 on a GPU, nothing on a CPU."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def load(self) -> None:
        """Goes back to the last save."""
        state = torch.load(self.args.checkpoint, map_location=self.device, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        if state["layers"] != self.n_layers:
            self.use(grown(self.model, state["layers"]))
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.kept.load_state_dict(state["kept"])
        self.ground.load_state_dict(state["ground"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates):
                group["peak"] = rate  # the rates of this command, not of the interrupted one

    def save(self) -> None:
        """Writes checkpoint and export, each atomically."""
        state = dict(
            step=self.step, seconds=self.seconds, layers=self.n_layers, model=self.model.state_dict(),
            heads=self.heads.state_dict(), kept=self.kept.state_dict(), ground=self.ground.state_dict(), optimizers=[o.state_dict() for o in self.optimizers],
        )  # fmt: skip
        temporary = self.args.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.args.checkpoint)
        export(self.model, self.args.out)

    def loader(self, data) -> DataLoader:
        workers = self.args.workers
        return DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)

    def train_vision(self) -> None:
        """Stage 1."""
        args = self.args
        optimizers = make_optimizers([(self.tower, 1.0), (self.heads, 1.0)], args.lr)
        params = [*self.tower.parameters(), *self.heads.parameters()]
        batches = self.loader(Patches(args.vision_batch, 0, args.vision_steps, args.patch))
        for step, (images, patches) in enumerate(tqdm(batches, desc="vision")):
            set_rate(optimizers, step, step / args.vision_steps)
            with self.autocast():
                features = vision_features(self.model, images.to(self.device))
                loss, accuracy = self.heads(features, patches.to(self.device))
            apply_gradients(params, [torch.autograd.grad(loss, params, allow_unused=True)], optimizers)
            if step % 50 == 49:
                names = ("kind", "colour", "size", "digit", "place")
                shown = " ".join(f"{n} {a:.3f}" for n, a in zip(names, accuracy.tolist()))
                tqdm.write(f"vision step {step + 1} loss {loss.item():.4f} {shown}")

    @torch.no_grad()
    def start_projector(self) -> None:
        """Starts the projector with stage 1's readouts and a whitening of the tower's features, at the scale of text.

        After stage 1 a few dimensions, the same for all patches, are far larger than the rest, and shapes lie in the
        smallest. Started at random, the projector hands out tokens hundreds of times larger than a layer's output, which
        no layer can change, and the language model does not learn shapes in the time that is enough for everything.
        """
        scenes = [make_scene(seed, "train") for seed in range(64)]
        images = torch.from_numpy(np.stack([pixels(s) for s in scenes])).to(self.device)
        features = vision_features(self.model, images).flatten(0, 1)
        first = self.model.model.multi_modal_projector.linear_1
        second = self.model.model.multi_modal_projector.linear_2

        # the readouts' LayerNorm, with every token's deviation replaced by their mean, makes them linear
        centred = torch.eye(features.shape[1], device=self.device) - 1.0 / features.shape[1]
        norm = self.heads.norm
        readouts = torch.cat([head.weight for head in self.heads.heads]) * norm.weight @ centred
        readouts = readouts / (features @ readouts.T).std(0)[:, None]

        mean, covariance = features.mean(0), features.T.cov()
        values, vectors = torch.linalg.eigh(covariance)
        # the floor keeps directions of next to no variance from becoming noise
        scale = (values.clamp(min=0) + 0.01 * values.mean()).rsqrt()
        rotation = torch.nn.init.orthogonal_(torch.empty_like(first.weight))
        first.weight.copy_(rotation @ (vectors * scale) @ vectors.T)
        first.weight[: len(readouts)] = 2.0 * readouts
        first.bias.copy_(-first.weight @ mean)

        torch.nn.init.orthogonal_(second.weight)
        second.bias.zero_()
        projected = second(F.gelu(first(features)))
        text_std = self.model.model.language_model.embed_tokens.weight.std()
        second.weight.mul_(text_std / projected.std(0).mean())
        second.bias.copy_(-second(F.gelu(first(features))).mean(0))

    def train_language(self) -> None:
        """Stage 2."""
        args = self.args
        last = args.steps if args.minutes is None else 10**9
        numbers = range(VALIDATION_SEED, VALIDATION_SEED + 64)
        held_out = [collate([sample(s, "heldout", args.patch, single=True) for s in numbers[i : i + 16]]) for i in range(0, 64, 16)]
        held_out = [b.to(self.device) for b in held_out]
        bar = tqdm(self.loader(Packed(args.batch, self.step, last, args.patch)), desc="llava", initial=self.step,
                   total=None if args.minutes else last)  # fmt: skip
        clock, reported = time.monotonic(), time.monotonic()
        running, grown_at = None, self.step
        for batch in bar:
            progress = self.step / last if args.minutes is None else self.seconds / 60 / args.minutes
            if progress >= 1.0:
                break
            if progress >= args.grow_at and self.n_layers < args.layers:
                self._report(held_out, running, progress)
                self.use(grown(self.model, args.layers))
                grown_at = self.step
            set_rate(self.optimizers, self.step - grown_at, progress)
            total = batch.weights.sum()
            parts = [p.to(self.device) for p in batch.split(self.n_parts)]
            shares = list(self.pool.map(lambda part: self._gradients(part, total, len(parts)), parts))
            apply_gradients(self.params, [gradients for *_, gradients in shares], self.optimizers)
            loss = sum(loss for loss, *_ in shares)
            grounded = sum(share for _, share, _ in shares) / len(shares)
            self.step += 1
            now = time.monotonic()
            self.seconds, clock = self.seconds + min(now - clock, LONGEST_STEP), now
            now_at = np.array([loss, grounded])
            running = now_at if running is None else 0.98 * running + 0.02 * now_at
            bar.set_postfix(loss=f"{running[0]:.4f}", grounded=f"{running[1]:.3f}")
            if now - reported > 60 * args.eval_minutes or self.step == 100:
                reported = now
                self._report(held_out, running, progress)
        self._report(held_out, running, 1.0)

    def _gradients(self, batch: Batch, total: torch.Tensor, n_parts: int) -> tuple[float, float, tuple]:
        """Loss, share of phrases grounded and gradients of a part of a batch; ``total`` is the loss weight of the whole batch."""
        with self.autocast():
            out = forward(self.model, batch)
            patch_loss = self.heads(out.features, batch.patches)[0] + self.kept(out.visual, batch.patches)[0]
            ground_loss, grounded = self.ground(out.middle, batch.grounds)
        token_loss = F.cross_entropy(out.logits.float(), batch.targets[out.chosen], reduction="none")
        loss = (token_loss * batch.weights[out.chosen]).sum() / total
        combined = loss + (PATCH_LOSS_WEIGHT * patch_loss + GROUND_LOSS_WEIGHT * ground_loss) / n_parts
        return loss.item(), grounded.item(), torch.autograd.grad(combined, self.params, allow_unused=True)

    def _report(self, held_out, running, progress: float) -> None:
        trained = "" if running is None else f"loss {running[0]:.4f} grounded {running[1]:.3f} "
        shown = " ".join(f"{task} {a:.3f}" for task, a in validate(self.model, held_out, self.autocast).items())
        tqdm.write(f"step {self.step} ({self.seconds / 60:.1f} min, {progress:.0%}) {trained}{shown}")
        self.save()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.compile:
        compile_block()
    run = Run(args)
    if args.checkpoint.exists():
        run.load()
    else:
        run.train_vision()
        run.start_projector()
        run.save()
    if run.n_parts > 1:
        torch.set_num_threads(1)  # from here on, the pool's threads are the parallelism
    run.train_language()


if __name__ == "__main__":
    main()
