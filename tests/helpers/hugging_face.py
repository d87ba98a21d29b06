"""Hugging Face's Trainer and accelerate on a tiny Llama: with model_init and PEFT, and on two ranks of gloo."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

RATE = 1e-2
DATA = [{"input_ids": row, "labels": row} for row in torch.arange(48 * 9).reshape(48, 9) * 7 % 11]


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=16, vocab_size=11)
    return LlamaForCausalLM(LlamaConfig(**shape))


def start() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model().named_parameters()}


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.0))


def fine_tune(folder: Path, kill: bool = False, resume: bool = False) -> list[float]:
    """The losses of six steps of TRL's SFT trainer, of which the third is saved; with `kill` SIGKILL ends the fifth."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from zeta.backends.torch import Eta, for_trainer

    torch.set_num_threads(1)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefghi.?")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=".", eos_token=".", unk_token="?")
    rows = [{"text": " ".join("abcdefghi"[i * k % 9] for k in range(8))} for i in range(48)]
    arguments = SFTConfig(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=RATE, save_steps=3, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, dataloader_pin_memory=False,
    )  # fmt: skip
    pair = for_trainer(Eta, lr=arguments.learning_rate)
    trainer = SFTTrainer(
        model(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizer_cls_and_kwargs=pair, callbacks=[kill_at(5)] if kill else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def kill_at(step: int) -> Any:
    """What ends this process with SIGKILL after the step."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


def train(folder: Path, steps: int, stop_at: int = 0, resume: bool = False) -> tuple[list[dict[str, Any]], Any]:
    """(what Trainer logged, its optimizer)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from zeta.backends.torch import Eta, for_trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop_at

    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=RATE, save_steps=3, logging_steps=1,
        lr_scheduler_type="linear", activation_checkpointing=True, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    pair = for_trainer(Eta, lr=arguments.learning_rate)
    trainer = Trainer(
        model_init=adapted, args=arguments, train_dataset=DATA, optimizer_cls_and_kwargs=pair, callbacks=[Stop()]
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer.state.log_history, getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def trainer(folder: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from zeta.backends.torch import Eta, for_trainer

    given = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    return Trainer(model(), given, train_dataset=DATA, optimizer_cls_and_kwargs=for_trainer(Eta, lr=RATE))


def rank(rank: int, how: str, folder: str, kill: bool = False) -> None:
    torch.set_num_threads(1)
    if rank == 0 and not kill:  # what one process takes, of the batches of both ranks
        torch.save(plain(), f"{folder}/alone.pt")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29400 + os.getppid() % 500)}  # fmt: skip
    if kill:
        over_ranks(f"{folder}/killed", how, kill=True)
    torch.save(resumed(folder, how), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def options() -> dict[str, Any]:
    return dict(lr=RATE, ns_dtype=torch.float32)


def plain() -> dict[str, torch.Tensor]:
    from zeta.backends.torch import Eta, param_groups

    m = model()
    optimizer = Eta(param_groups(m), **options())
    for t in range(4):
        step(m, optimizer, DATA[8 * t : 8 * t + 8])
    return {name: p.detach() for name, p in m.named_parameters()}


def step(m: Any, optimizer: Any, rows: Any) -> None:
    ids = torch.stack([row["input_ids"] for row in rows])
    m(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def over_ranks(folder: str, how: str, kill: bool = False, resume: bool = False) -> dict[str, torch.Tensor]:
    """The parameters after four steps, of which the second is saved; with `kill` SIGKILL ends the third."""
    from transformers import Trainer, TrainingArguments

    from zeta.backends.torch import Eta, for_trainer

    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        train_sampling_strategy="sequential", ddp_backend="gloo", **(fsdp2() if how == "fsdp2" else {}),
    )  # fmt: skip
    pair = for_trainer(Eta, **options())
    kills = [kill_at(3)] if kill else []
    trainer = Trainer(model(), arguments, train_dataset=DATA, optimizer_cls_and_kwargs=pair, callbacks=kills)
    trainer.train(resume_from_checkpoint=resume or None)
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert all(hasattr(p, "full_tensor") == (how == "fsdp2") for p in parameters.values())
    return {name: p.full_tensor() if how == "fsdp2" else p for name, p in parameters.items()}


def fsdp2() -> dict[str, Any]:
    """The arguments that shard the model. accelerate 1.15 shards over GPUs alone: these ranks are declared to be."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # as Trainer does where the state is its own
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
    return dict(fsdp=True, fsdp_config={}, accelerator_config={"use_configured_state": True})


def resumed(folder: str, how: str) -> dict[str, torch.Tensor]:
    """Of the run that was killed, which is bit for bit that of one that was not."""
    whole, again = over_ranks(f"{folder}/whole", how), over_ranks(f"{folder}/killed", how, resume=True)
    assert all(torch.equal(whole[name], p) for name, p in again.items())
    return again
