"""Where must bidirectional inputs help, and where can they not? Words and a dictionary that follows or precedes them.

command    lab run dictionary && lab status dictionary
           lab run dictionary --preset early --out runs/early; --preset two_layers --out runs/two_layers
cost       2.8e12 FLOPs in 2 runs (two_layers 3.5e12), 230 s in one process on a core shared with others (115 s of its time)
expected   small (late dictionary, one layer, memory=final): bidirectional 0.000, causal 1.057 nats a target of ln 8 = 2.079
           early (dictionary first): 0.000 and 0.000
           two_layers (late dictionary, memory=same): prefix_lm 0.000, decoder_only 0.961: 0 is in its reach
           (lab.data.synthetic.dictionary, 4), and it is not learned in as many steps. One seed each.
"""

from dataclasses import replace

from lab.spec import Evaluation, Optimizer
from lab.structure import STRUCTURES
from sweeps.ladder import ladder
from sweeps.study import Match, Study, arm, corpus

PRESETS = {
    "small": ("late_dictionary", "encoder_decoder", 1),
    "early": ("early_dictionary", "encoder_decoder", 1),
    "two_layers": ("late_dictionary", "prefix_lm", 2),
}


def study(preset: str = "small") -> Study:
    task, structure, depth = PRESETS[preset]
    data = corpus(f"{task}:documents=8192")
    arms = {
        inputs: arm(
            replace(STRUCTURES[structure], inputs=inputs),
            data,
            S=32,
            T=16,
            optimizer=Optimizer(learning_rate=0.01, weight_decay=0.0),
            evaluation=Evaluation(examples=1024),
        )
        for inputs in ("bidirectional", "causal")
    }
    return Study(
        name="dictionary",
        question="Do bidirectional inputs help where a dictionary follows the words that it explains?",
        arms=arms,
        baseline="causal",
        match=Match(quantity="tokens"),
        budgets=(4000 * 64 * 48.0,),
        sizes=ladder(32, depth=depth),
        window=1,
        batch=64,
        learning_rate=0.01,
    )
