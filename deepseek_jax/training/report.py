"""What a finished run shows: pictures, a comparison with compressors, and a sample of what it writes."""

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.serving import generate
from deepseek_jax.training.plots import plot_expert_load, plot_loss


def finish(config: Config, workdir: str, state, loader: Loader):
    """Draws WORKDIR/loss.png and expert_load.png and prints a sample."""
    pictures = [plot_loss(workdir)]
    if config.model.num_moe_layers or config.model.mtp_depth:
        pictures.append(plot_expert_load(workdir))
    print("Pictures: " + ", ".join(str(p) for p in pictures))
    if config.train.sample_tokens:
        print("Sample:\n" + sample(config, state, loader.tokenizer))


def sample(config: Config, state, tokenizer) -> str:
    """A continuation of config.train.sample_prompt, drawn at temperature 0.8."""
    prompt = [tokenizer.bos, *tokenizer.encode(config.train.sample_prompt)]
    made = generate(config.model, {"params": state.params, "router": state.router}, [prompt],
                    config.train.sample_tokens, temperature=0.8, seed=config.train.seed, eos_id=tokenizer.eos)
    return tokenizer.decode([*prompt[1:], *made.tokens[0]])
