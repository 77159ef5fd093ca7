# strategy: one task from a few thousand examples (classify, extract, answer in a format)
# The model learns the format quickly, and must not forget the language. Use a low learning rate,
# dropout against memorizing examples, and the best checkpoint by validation loss. Give --dataset.
out_dir = "out-task"
eval_interval = 50
eval_iters = 200

init_from = "gpt2"
batch_size = 4
gradient_accumulation_steps = 8

learning_rate = 3e-5
dropout = 0.1
max_iters = 1000
warmup_iters = 50
always_save_checkpoint = False
patience = 5  # stop after five evaluations without improvement
