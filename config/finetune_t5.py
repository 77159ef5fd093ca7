# finetune T5 to write the target of each source: translate, summarize, extract, classify
# data: python data/pairs/prepare.py --input=FILE --tokenizer=google-t5/t5-base --out_dir=data/mine
# Give --dataset; --init_from takes google-t5/t5-*, google/t5-v1_1-*, google/flan-t5-* or a folder
out_dir = "out-t5"
eval_interval = 100
eval_iters = 400  # pairs

init_from = "google-t5/t5-base"
# 8 pairs x 4 micro-steps = 32 pairs per step
batch_size = 8
gradient_accumulation_steps = 4

learning_rate = 1e-4  # T5 takes higher rates than a GPT: 1e-4 to 3e-4 with AdamW
decay_lr = False
dropout = 0.1
beta2 = 0.999  # few target tokens per step: average over more steps
weight_decay = 0.0
max_iters = 1000
always_save_checkpoint = False  # keep the best by validation loss
patience = 5  # stop after five evaluations without improvement
