# finetune GPT-2 to answer "Tweet: ...\nSentiment:" with " positive" or " negative"
# data: python data/twitter_sentiment/prepare.py; make sentiment runs all steps
out_dir = "out-twitter-sentiment"
eval_interval = 58  # half an epoch
eval_iters = 28      # 14,336 tokens: the whole validation split, and as many training tokens

dataset = "twitter_sentiment"
init_from = "gpt2"  # or EleutherAI/gpt-neo-125m
always_save_checkpoint = False  # keep the best by validation loss; the test set is not used

# 4 samples x 512 tokens = 2,048 tokens per step, about 77 tweets of 27 tokens
# 237,757 tokens of 8,956 tweets: 1 epoch = 116 steps
batch_size = 4
gradient_accumulation_steps = 1
block_size = 512  # the end of a window cuts 1 of 20 tweets; with 256, 1 of 10
max_iters = 348  # 3 epochs

separate_documents = True  # the previous tweet is unrelated

learning_rate = 5e-5
warmup_iters = 35
dropout = 0.1
beta2 = 0.999     # two answer tokens in 27 make a noisy gradient: average over more steps
weight_decay = 0.01
