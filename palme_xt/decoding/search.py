"""Beam search over texts that are decoded together.

Letters in shapes: b batch, n new tokens, k beams, v vocabulary.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from palme_xt.decoding.loop import Texts
from palme_xt.decoding.request import SearchRequest


def beam_search(texts: Texts, request: SearchRequest, pad_value: int) -> tuple[Tensor, Tensor]:
    """Decode the `beams` most likely texts of each sample that a beam search of that width finds.

    The score of a text is the sum of its tokens' log probabilities, divided by its length to the power
    `length_penalty`. The length is that of the new tokens, EOS included (as in Hugging Face's generate; Wu et al. 2016,
    arXiv:1609.08144, section 7, has a variant). A sample that is done, as `early_stopping` defines it, causes no
    further computation.

    Returns:
        Token ids `(k, b, seq_len)`, best first, with `pad_value` after EOS, and their scores `(k, b)`, float32. If a
        sample has fewer than k texts, the rest is padding with the score -inf.

    Raises:
        ValueError: If the logits are nan.
    """
    beams, seq_len, penalty = request.beams, request.seq_len, request.length_penalty
    batch, prompt_len = texts.ids.shape
    device = texts.ids.device
    # The best finished texts of each sample, best first, with the score -inf for missing ones.
    finished = torch.full((batch, beams, seq_len), pad_value, device=device)
    finished_scores = torch.full((batch, beams), -torch.inf, device=device)
    going = torch.arange(batch, device=device)  # indices of the samples that are still in `texts`
    scores = torch.zeros(batch, 1, device=device)  # (b, width) of the unfinished beams, best first
    for length in range(1, seq_len + 1):
        logits = texts.next_logits()
        width, vocabulary = scores.shape[1], logits.shape[-1]
        log_probs = request.process(texts.ids, logits.float().log_softmax(dim=-1))
        totals = (scores[..., None] + rearrange(log_probs, "(b w) v -> b w v", w=width)).flatten(1)
        # Each beam may end with each EOS: take so many candidates that enough others continue.
        candidates = min(beams * (1 + max(1, len(request.eos_tokens))), totals.shape[1])
        scores, best = totals.topk(candidates, dim=1)
        parents, tokens = best // vocabulary, best % vocabulary

        so_far = rearrange(texts.ids[:, prompt_len:], "(b w) n -> b w n", w=width)
        extended = torch.cat([so_far.take_along_dim(parents[..., None], dim=1), tokens[..., None]], dim=-1)[:, :beams]
        last = length == seq_len
        ends = torch.isin(tokens, request.eos_tokens) | last
        if last or len(request.eos_tokens):
            padded = nn.functional.pad(extended, (0, seq_len - length), value=pad_value)
            ended_scores = (scores / length**penalty).masked_fill(~ends, -torch.inf)[:, :beams]
            finished_scores[going], kept = torch.cat([finished_scores[going], ended_scores], dim=1).topk(beams, dim=1)
            finished[going] = torch.cat([finished[going], padded], dim=1).take_along_dim(kept[..., None], dim=1)

        scores, best = scores.masked_fill(ends, -torch.inf).topk(min(beams, scores.shape[1]), dim=1)
        worst = finished_scores[going].amin(dim=1)
        # The sum of log probabilities can only fall from here on, and the length that divides it can only grow.
        longest = seq_len if request.early_stopping == "never" and penalty > 0 else length
        improvable = worst.isneginf() if request.early_stopping is True else scores[:, 0] / longest**penalty > worst
        stays = improvable.nonzero()[:, 0]
        if last or len(stays) == 0:
            break
        parent_rows = parents.gather(1, best) + width * torch.arange(len(going), device=device)[:, None]
        same_samples = len(stays) == len(going) and best.shape[1] == width
        texts.select(rearrange(parent_rows[stays], "b w -> (b w)"), same_samples=same_samples)
        texts.append(rearrange(tokens.gather(1, best)[stays], "b w -> (b w)"))
        scores, going = scores[stays], going[stays]
    finished.masked_fill_(finished_scores.isneginf()[..., None], pad_value)
    return rearrange(finished, "b k n -> k b n"), rearrange(finished_scores, "b k -> k b")
