#!/usr/bin/env python3
"""Mixture-of-Students: a shallower PR-MoE with and without a teacher (Rajbhandari 2022, DeepSpeed-MoE).

    scripts/reproduce/mos.py --json build/mos.json

Published (LAMBADA, zero-shot, 24 and 21 layers): teacher 63.65, student from scratch 62.33, taught all the time 61.56,
taught for about 2/3 of the steps 63.46. Here: 6 and 4 layers, all of them trained for as many steps; `hint` is staged
and also draws the student's last state but one MoE layer to the teacher's. Speed is that of evaluation, in turn.
"""

from common import SMALL_LM, arguments, loss_table, open_study, train, write_json
from speed import evaluations, in_turn

PR_MOE = (*SMALL_LM, "model.moe.every=2", "model.moe.residual=sum", "model.moe.router.top_k=1")
TEACHER = (*PR_MOE, "model.num_layers=6", "model.moe.experts=[4,4,8]")
STUDENT = (*PR_MOE, "model.num_layers=4", "model.moe.experts=[4,8]")


def main() -> None:
    with open_study(arguments(__doc__)) as options:
        teacher = train(options, "teacher", *TEACHER)
        # Each seed has its own teacher; Hydra fills in the seed.
        taught = (*STUDENT, f"distill.teacher={options.runs.resolve()}/teacher/seed-${{seed}}")
        variants = {
            "teacher": teacher,
            "student": train(options, "student", *STUDENT),
            "full": train(options, "full", *taught, "distill.until=1"),
            "staged": train(options, "staged", *taught),
            "hint": train(options, "hint", *taught, "distill.hint_blocks=[4,2]"),
        }
        students = {name: runs for name, runs in variants.items() if name != "teacher"}
        print(loss_table({"student": students.pop("student"), "teacher": teacher, **students}))
        times = in_turn({name: evaluations(variants[name][0]) for name in ("teacher", "student")})
        print(f"\ntime of the student's evaluation ÷ the teacher's: {times['student']:.2f}")
        write_json(options, [run for runs in variants.values() for run in runs], time=times)


if __name__ == "__main__":
    main()
