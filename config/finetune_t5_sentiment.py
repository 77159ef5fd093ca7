# finetune T5 to answer "sst2 sentence: ..." with "positive" or "negative"
# data: python data/twitter_sentiment/prepare.py --pairs --tokenizer=google-t5/t5-base
# make sentiment runs all steps
out_dir = "out-t5-sentiment"
eval_interval = 141  # half an epoch
eval_iters = 500     # pairs: the whole validation split, and as many training pairs

dataset = "twitter_sentiment"
init_from = "google-t5/t5-base"
always_save_checkpoint = False  # keep the best by validation loss; the test set is not used

# 32 tweets per step; 9,024 tweets: 1 epoch = 282 steps
batch_size = 32
gradient_accumulation_steps = 1
max_iters = 846  # 3 epochs

learning_rate = 1e-4
decay_lr = False
dropout = 0.1
beta2 = 0.999
weight_decay = 0.0
