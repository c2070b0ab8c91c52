"""Tables and figures of the notebooks, and the claims table. Everything printed comes from runs or from counting.

Tables are pandas frames with texts ready to print; figures are matplotlib figures drawn with seaborn. Below
`imagenet` a figure plots differences to the reference arm, since accuracies of different data share no axis.

    tables      what all share: form, file, legend       models      sizes, counted
    accuracy    arms, differences, intervals             printed     the paper's own numbers
    transfer    Table 6                                  costs       memory and time
    stems       Table 7, Figures 5 and 6                 judgements  verdicts, claims, tuning
"""

from lab.report.accuracy import (
    accuracies,
    arms_of,
    blocked_model,
    committed_values,
    contrast,
    correct,
    difference_figure,
    finished,
    gap_figure,
    gaps,
    models_of,
    points,
    provenance,
    sequential,
    top1,
)
from lab.report.costs import (
    SETTINGS,
    benchmark,
    figure4_memory,
    form_memory,
    inference_memory,
    memory_savings,
    plan_table,
    step_costs,
    step_multiply_adds,
    throughput_figure,
    trained_shares,
)
from lab.report.judgements import claims_table, stances, tested_elsewhere, tuning_table, verdict_rows, verdicts
from lab.report.models import arm_sizes, figure_models, fused_sizes, sizes, table1_sizes, table3_models
from lab.report.printed import (
    figure1,
    paper_baselines,
    paper_branches,
    paper_forms,
    paper_gaps,
    paper_layer_scale,
    paper_pairs,
    paper_procedures,
    paper_recipes,
    paper_resolution,
    paper_stem,
    paper_stems,
    paper_throughput,
    paper_transfer,
    printed_stem,
)
from lab.report.stems import (
    GREY,
    LEAK_ROWS,
    TARGETS,
    codebook_use,
    leak_figure,
    leak_maps,
    leak_table,
    masking_figure,
    reconstruction_figure,
    stem_figure,
    stem_sizes,
    table7,
    tokenizers_of,
    trainings,
)
from lab.report.tables import (
    NOT_RUN,
    WITHOUT_RUNS,
    legend,
    markdown,
    reference_dates,
    reference_table,
    save_table,
    theme,
)
from lab.report.transfer import splits, transfer_figure, transfer_table
