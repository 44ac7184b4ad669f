"""The typed configuration: what it accepts, and that each impossible value is refused by name."""

import pytest
from omegaconf import OmegaConf

from twohop.models.config import BatchPriority, ModelConfig, MoEConfig, RouterConfig
from twohop.trainer import config as c
from twohop.trainer.config import CommConfig, Config, DataConfig, EvalConfig, LaunchConfig, TrainConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.validate.groups import validate


@pytest.mark.parametrize(
    ("given", "stored", "sizes"),
    [(None, [], [4, 2, 4]), (2, [2], [2, 2, 2]), ([1, 2, 4], [1, 2, 4], [1, 2, 4]), ((4,), [4], [4, 4, 4])],
)
def test_ep_size_is_null_one_size_or_one_for_each_layer(given, stored, sizes):
    comm = CommConfig(ep_size=given)
    assert comm.ep_size == stored
    assert comm.ep_sizes([4, 6, 8], world_size=4) == sizes


def test_files_are_one_path_or_a_list():
    assert DataConfig(files="book.txt").files == ["book.txt"]
    assert DataConfig(files=["a", "b"]).files == ["a", "b"]
    assert DataConfig().files == []


def test_stored_configuration_gives_the_same_objects_again():
    config = Config(comm=CommConfig(ep_size=2), data=DataConfig(files="a"), model=ModelConfig(moe=MoEConfig([4])))
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    config.run.name = config.model.name  # an interpolation, which to_object resolves
    assert again == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CommConfig(ep_size="two"), r"comm\.ep_size=two: use null"),
        (lambda: CommConfig(ep_size=[2, True]), r"comm\.ep_size="),
        (lambda: CommConfig(ep_size=0), r"comm\.ep_size=\[0\]: an expert-parallel size is at least 1"),
        (lambda: CommConfig(ranks_per_node=0), r"comm\.ranks_per_node=0"),
        (lambda: CommConfig(chunks=0), r"comm\.chunks=0: use 1 for no overlap"),
        (lambda: CommConfig(dispatcher="auto", chunks=4), r"comm\.chunks=4 has no use with comm=auto"),
        (lambda: CommConfig(auto_wires=["bf16"]), r"comm\.auto_wires has no use with comm\.dispatcher=dedup"),
        (lambda: CommConfig(cost_file="cost.json"), r"comm\.cost_file has no use with comm\.dispatcher=dedup"),
        (lambda: c.BenchConfig(tokens=[]), r"tokens=\[\]: name at least one value"),
        (lambda: c.BenchConfig(chunks=[1, 0]), r"chunks contains 0"),
        (lambda: c.BenchConfig(repeats=0), r"repeats=0"),
        (lambda: c.BenchConfig(timeout_s=0), r"timeout_s=0"),
        (lambda: c.BenchConfig(experts=4), r"top_k=8 is more than the 4 experts"),
        (lambda: CommConfig(init_timeout_s=0), r"comm\.init_timeout_s=0"),
        (lambda: CommConfig(timeout_s=-1), r"comm\.timeout_s=-1"),
        (lambda: DataConfig(files=[1]), r"data\.files=\[1\]: use a path"),
        (lambda: DataConfig(valid_fraction=1.0), r"data\.valid_fraction=1\.0"),
        (lambda: DataConfig(max_mib=0), r"data\.max_mib=0"),
        (lambda: c.TokenizerConfig(kind=c.TokenizerKind.file), r"data\.tokenizer\.file is not set"),
        (lambda: c.TokenizerConfig(file="t.json"), r"data\.tokenizer\.file=t\.json has no use with kind=bytes"),
        (
            lambda: c.EngineConfig(zero_stage=1),
            r"engine\.zero_stage=1 has no use with engine=ddp: add engine=deepspeed",
        ),
        (lambda: c.EngineConfig(name="deepspeed", zero_stage=3), r"zero_stage=3: .*use zero_stage=2, or engine=fsdp"),
        (lambda: c.EngineConfig(name="deepspeed", zero_stage=-1), r"engine\.zero_stage=-1: use 0, 1 or 2"),
        (
            lambda: c.EngineConfig(name="deepspeed", reshard_after_forward=False),
            r"engine\.reshard_after_forward=False has no use with engine=deepspeed",
        ),
        (lambda: c.OptimConfig(lr=0), r"optim\.lr=0"),
        (lambda: c.OptimConfig(betas=[0.9]), r"optim\.betas=\[0\.9\]"),
        (lambda: c.OptimConfig(betas=[0.9, 1.0]), r"optim\.betas="),
        (lambda: c.OptimConfig(eps=0), r"optim\.eps=0"),
        (lambda: c.OptimConfig(weight_decay=-1), r"optim\.weight_decay=-1"),
        (lambda: c.OptimConfig(expert_lr_scale=-1), r"optim\.expert_lr_scale=-1"),
        (lambda: c.OptimConfig(clip_norm=0), r"optim\.clip_norm=0"),
        (lambda: c.ScheduleConfig(warmup_steps=-1), r"schedule\.warmup_steps=-1"),
        (lambda: c.ScheduleConfig(decay_fraction=2), r"schedule\.decay_fraction=2"),
        (lambda: c.ScheduleConfig(final_fraction=-0.1), r"schedule\.final_fraction=-0\.1"),
        (lambda: TrainConfig(steps=0), r"train\.steps=0: use 1 or more"),
        (lambda: TrainConfig(seq_len=0), r"train\.seq_len=0"),
        (lambda: TrainConfig(global_batch=0), r"train\.global_batch=0"),
        (lambda: TrainConfig(micro_batch=0), r"train\.micro_batch=0"),
        (lambda: EvalConfig(every=-1), r"eval\.every=-1"),
        (lambda: EvalConfig(batches=-1), r"eval\.batches=-1"),
        (lambda: EvalConfig(exit_confidence=1), r"eval\.exit_confidence=1: use a probability in \[0, 1\)"),
        (lambda: EvalConfig(expert_bits=2), r"eval\.expert_bits=2: use 8, 4 or null"),
        (lambda: MoEConfig(expert_bits=16), r"model\.moe\.expert_bits=16: use 8, 4 or null"),
        (lambda: c.DistillConfig(teacher=""), r"distill\.teacher is empty: name the run folder"),
        (lambda: c.DistillConfig(teacher="a", weight=-1), r"distill\.weight=-1"),
        (lambda: c.DistillConfig(teacher="a", temperature=0), r"distill\.temperature=0: use a positive"),
        (lambda: c.DistillConfig(teacher="a", until=0), r"distill\.until=0: use a part of the steps"),
        (lambda: c.DistillConfig(teacher="a", hint_blocks=[1]), r"distill\.hint_blocks=\[1\]: use \[teacher's block"),
        (lambda: c.DistillConfig(teacher="a", hint_blocks=[0, 1]), r"distill\.hint_blocks=\[0, 1\]"),
        (lambda: c.DistillConfig(teacher="a", hint_weight=2), r"hint_weight=2 has no use without distill\.hint_blocks"),
        (lambda: c.DistillConfig(until=1), r"distill\.until=1 has no use without distill\.teacher"),
        (lambda: c.DistillConfig(weight=2), r"distill\.weight=2 has no use without distill\.teacher"),
        (lambda: c.GenerateConfig(prompt=""), r"generate\.prompt is empty"),
        (lambda: c.GenerateConfig(max_new_tokens=-1), r"generate\.max_new_tokens=-1"),
        (lambda: c.GenerateConfig(temperature=-1), r"generate\.temperature=-1"),
        (lambda: c.GenerateConfig(top_k=0), r"generate\.top_k=0"),
        (lambda: c.CheckpointConfig(every=-1), r"checkpoint\.every=-1"),
        (lambda: c.CheckpointConfig(keep=0), r"checkpoint\.keep=0"),
        (lambda: LaunchConfig(nproc=0), r"launch\.nproc=0"),
        (lambda: LaunchConfig(omp_threads=0), r"launch\.omp_threads=0"),
        (lambda: LaunchConfig(port=70000), r"launch\.port=70000"),
    ],
)
def test_impossible_value_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def moe(experts: list[int], **comm) -> Config:
    return Config(model=ModelConfig(num_layers=4, moe=MoEConfig(experts=experts)), comm=CommConfig(**comm))


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (moe([8], ranks_per_node=3), 4, r"comm\.ranks_per_node=3 does not divide the 4 ranks.*\[1, 2, 4\]"),
        (moe([8], ep_size=3), 4, r"comm\.ep_size=3 does not divide the 4 ranks.*\[1, 2, 4\]"),
        (moe([8], ep_size=[1, 2, 4]), 4, r"comm\.ep_size=\[1, 2, 4\] lists 3 layers.*2 MoE layers"),
        (moe([6, 8], ep_size=4), 4, r"6 experts of a layer.*cannot be shared evenly by comm\.ep_size=4"),
        (
            moe([8], dispatcher="dedupe"),
            1,
            r"comm\.dispatcher=dedupe: unknown, did you mean 'dedup'\?; use one of flat",
        ),
        (Config(train=TrainConfig(seq_len=512)), 1, r"train\.seq_len=512 is longer than model\.max_seq_len=256"),
        (Config(train=TrainConfig(global_batch=16, micro_batch=4)), 3, r"train\.global_batch=16 .* use 12"),
        (Config(train=TrainConfig(global_batch=2, micro_batch=4)), 2, r"train\.global_batch=2 .* use 8"),
        (Config(engine=c.EngineConfig(name="dpp")), 1, r"engine\.name=dpp: unknown, did you mean 'ddp'"),
        (Config(optim=c.OptimConfig(name="adam")), 1, r"optim\.name=adam: unknown, did you mean 'adamw'"),
        (Config(tracker=c.TrackerConfig(name="wandbb")), 1, r"tracker\.name=wandbb: unknown, did you mean 'wandb'"),
        (Config(data=DataConfig(source="txt")), 1, r"data\.source=txt: unknown, did you mean 'text'"),
        (Config(data=DataConfig(source="text")), 1, r"data\.files is not set: data=text needs a file"),
        (Config(data=DataConfig(source="tokens")), 1, r"data\.files is not set: data=tokens needs the folder"),
        (Config(data=DataConfig(files="a.txt")), 1, r"data\.files=\['a\.txt'\] has no use with data=stdlib"),
    ],
)
def test_groups_that_do_not_fit_together_are_refused(config, world_size, message):
    with pytest.raises(ConfigError, match=message):
        validate(config, world_size)


def test_wire_formats_and_cost_file_are_looked_at_before_workers_start(tmp_path):
    config = moe([8])
    config.comm.wire.combine.between = "fp9"
    with pytest.raises(ConfigError, match=r"comm\.wire\.combine\.between=fp9: unknown, did you mean 'fp8'"):
        validate(config, 1)
    with pytest.raises(ConfigError, match=r"comm\.auto_wires=int4: unknown"):
        validate(moe([8], dispatcher="auto", auto_wires=["bf16", "int4"]), 1)
    with pytest.raises(ConfigError, match=r"comm\.cost_file: cost file .*none\.json cannot be read"):
        validate(moe([8], dispatcher="auto", cost_file=str(tmp_path / "none.json")), 1)


def test_router_is_known_and_takes_its_options():
    config = moe([8])
    config.model.moe.router.name = "softmax_topkk"
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.name=softmax_topkk: unknown, did you mean"):
        validate(config, 1)
    config.model.moe.router.name, config.model.moe.router.top_k = "switch", 2
    with pytest.raises(ConfigError, match="top_k"):
        validate(config, 1)


def test_what_fits_is_accepted():
    validate(moe([8], ep_size=[1, 4], ranks_per_node=2), 4)
    validate(Config(), 1)


def decoder(training: bool, world_size: int = 1, **moe_options) -> None:
    router = RouterConfig(**moe_options.pop("router", {}))
    moe_config = MoEConfig(experts=[8], router=router, **moe_options)
    validate(Config(model=ModelConfig(moe=moe_config)), world_size, training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": {"name": "expert_choice"}}, r"router\.name=expert_choice: an expert chooses among all tokens"),
        ({"router": {"name": "sinkhorn"}}, r"router\.name=sinkhorn: .*allow_non_causal=true"),
        ({"router": {"name": "sentence"}}, r"router\.name=sentence: the gate sees the mean of the whole sequence"),
        ({"batch_priority": BatchPriority.max, "capacity_factor": 1.0}, r"model\.moe\.batch_priority=max: tokens are"),
    ],
)
def test_routes_that_look_ahead_train_a_decoder_only_on_request(options, message):
    with pytest.raises(ConfigError, match=message):
        decoder(training=True, **options)
    decoder(training=True, allow_non_causal=True, **options)
    decoder(training=False, **options)


def test_priority_of_evaluation_alone_may_train():
    decoder(training=True, batch_priority=BatchPriority.sum, eval_capacity_factor=0.5)


def test_a_task_router_needs_tasks():
    with pytest.raises(ConfigError, match=r"model\.num_tasks=null: the task router needs it"):
        decoder(training=True, router={"name": "task"})
