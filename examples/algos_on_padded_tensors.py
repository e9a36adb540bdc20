"""Policy optimisation and preferences on padded [B, L] tensors, with nothing but `hone.algos`.

Run it from top to bottom, or cell by cell in an editor that knows `# %%`. Your trainer has padded tensors: pack them at the
door, do the mathematics on packed ones, and unpack what you want to look at.
"""

# %% Two prompts, two answers each, padded on the right; the first tokens of a row are the prompt's.
import torch

from hone.algos import Reduction, clipped_surrogate, group_normalised, token_weights
from hone.algos.conformance import LAWS, LawBroken, example, from_padded
from hone.algos.padding import pack_padded, unpack_padded
from hone.algos.pairs import pair_weights, row_logp, split_pairs
from hone.algos.preference import dpo

PAD = 0
tokens = torch.tensor([[5, 3, 7, 2, PAD, PAD], [5, 3, 4, 4, 2, PAD], [6, 8, 2, PAD, PAD, PAD], [6, 9, 1, 7, 3, 2]])
valid = tokens != PAD  # the tokenizer's attention mask, as booleans
prompt_lengths = torch.tensor([2, 2, 1, 1])
action_mask = valid & (torch.arange(6) >= prompt_lengths[:, None])
prompt = torch.tensor([0, 0, 1, 1])
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])

# %% A policy of one matrix: token -> logits of the next. Any model that gives logits [B, L, V] stands here.
torch.manual_seed(0)
policy = torch.nn.Embedding(10, 10)


def padded_logp(model):
    """Log-probability of every token given what stands before it; a row's first token has none."""
    logp = model(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logp, (1, 0), value=float("nan"))  # NaN where there is none: nothing may read it


# %% Pack at the door. What stands off the action mask, NaN included, changes nothing from here on.
mask, cu_seqlens = pack_padded(action_mask, valid)
old_logp, _ = pack_padded(padded_logp(policy).detach(), valid)
print(f"packed {mask.numel()} of {valid.numel()} slots, {int(mask.sum())} of them the policy's own; rows meet at {cu_seqlens.tolist()}")

# %% Each answer against the other answers to its prompt; the weights of the whole optimiser step, before anything is cut.
advantages = unpack_padded(mask.float(), valid) * group_normalised(rewards, prompt, eps=1e-6)[:, None]
weights = token_weights(mask, cu_seqlens, Reduction(over="token"))
packed_advantages, _ = pack_padded(advantages, valid)

# %% A few steps on the clipped surrogate.
optimiser = torch.optim.SGD(policy.parameters(), lr=2.0)
for step in range(3):
    logp, _ = pack_padded(padded_logp(policy), valid)
    loss = clipped_surrogate(logp, old_logp, packed_advantages, weights, mask, clip_low=0.2, clip_high=0.28)
    optimiser.zero_grad()
    loss.total.backward()
    optimiser.step()
    print(f"step {step}: loss {loss.total.detach():+.4f}, clipped {loss.metrics['ppo_clip_ratio']:.2f}")

# %% Back to padded, to look at it: how far each token of the answers has moved [nats].
with torch.no_grad():
    moved = unpack_padded(torch.where(mask, pack_padded(padded_logp(policy), valid)[0] - old_logp, 0.0), valid)
for row, (reward, gain) in enumerate(zip(rewards.tolist(), moved.sum(1).tolist(), strict=True)):
    print(f"answer {row}, reward {reward:.0f}: log-probability {gain:+.2f} nats")

# %% The same rows as preference pairs: chosen and rejected side by side, the policy from before as the reference.
order = torch.tensor([0, 1, 3, 2])
pair_valid, pair_actions = valid[order], action_mask[order]
pair_mask, pair_cu_seqlens = pack_padded(pair_actions, pair_valid)
logp, _ = pack_padded(padded_logp(policy)[order], pair_valid)
ref_logp, _ = pack_padded(unpack_padded(old_logp, valid)[order], pair_valid)
chosen, rejected = split_pairs(row_logp(logp - ref_logp, pair_mask, pair_cu_seqlens))
both = torch.ones(2, dtype=torch.bool)
preference = dpo(chosen, rejected, pair_weights(both), both, beta=0.1)
print(f"DPO: loss {preference.total.detach():.4f} (0.6931 where nothing moved), accuracy {preference.metrics['accuracy']:.2f}")


# %% Point the conformance kit at a loss of your own. This one divides by the tokens of the micro-batch it happens to see.
def mean_loss(logp, old_logp, advantages, action_mask, **_):
    ratio = torch.exp(torch.where(action_mask, logp - old_logp, 0.0))
    per_token = -ratio * torch.where(action_mask, advantages, 0.0)
    return per_token.sum() / action_mask.sum().clamp(min=1)


for name, law in LAWS["loss"].items():
    try:
        law(from_padded(mean_loss), example())
        print(f"{name}: holds")
    except LawBroken:
        print(f"{name}: broken")
