# strategy: conversations (data/chat/prepare.py); the loss counts the assistant's texts alone
# The model has the language and learns the turns, and when to stop. A low rate, dropout against
# learning answers by heart, few epochs, and the best checkpoint by validation loss.
# Each conversation attends to itself only. Then: python sample.py --out_dir=out-chat --chat
out_dir = "out-chat"
eval_interval = 20
eval_iters = 200
log_interval = 10

dataset = "chat"
init_from = "gpt2"
separate_documents = True
batch_size = 4
gradient_accumulation_steps = 8

learning_rate = 3e-5
dropout = 0.1
epochs = 3
warmup_iters = 10
always_save_checkpoint = False
patience = 5  # five evaluations without a better one: stop
