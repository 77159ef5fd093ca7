# make quickstart   pretrain a small GPT, finetune it, sample from it: 5 minutes on 2 CPU cores
# make chat         finetune the quickstart's model on conversations, and talk to it: minutes
#                   both: runs that are done are not trained again, and a stopped run is resumed;
#                   to train again, delete out-quickstart*
# make sentiment    GPT-2, GPT-Neo and T5 on Twitter sentiment, three splits each; resumes where it
#                   stopped; ARGS="--models=... --input=...": see experiments/twitter_sentiment.py
# make test         the test suite; make test-slow runs the longer tests
# make test-browser test serve.py's page in Chromium, which must be installed (Debian: apt-get
#                   install chromium); CHROMIUM=/path sets another Chromium-based browser
# make chaos        kill a tiny run 100 times at random, damage 200 checkpoints, and more: minutes
# make bench        speed and memory of GPT-2 124M, and of transformers' GPT-2; ARGS: see bench.py
# make lint         ruff
#
# Each target first creates .venv and installs what it needs. Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
PY := .venv/bin/python
# $(call train,OUT_DIR,ARGUMENTS) trains or resumes a run, unless it is done
train = grep -qs '"done"' $(1)/run.json || $(PY) train.py $(2) --auto_resume=True
INSTALLING = echo "--- installing torch and other packages into .venv: a few minutes"

.PHONY: quickstart chat sentiment test test-slow test-browser chaos bench lint clean

quickstart: .venv/.runs
	$(PY) data/python_docs/prepare.py
	@echo "--- 1. pretrain on the docstrings of Python's standard library, unless that is done"
	$(call train,out-quickstart-base,config/quickstart_pretrain.py)
	@echo "--- 2. finetune that model on Python's language reference, unless that is done"
	$(call train,out-quickstart,config/quickstart_finetune.py)
	@echo "--- 3. the same steps from scratch, to compare, unless that is done"
	$(call train,out-quickstart-scratch,config/quickstart_finetune.py --init_from=scratch --out_dir=out-quickstart-scratch)
	@echo "--- 4. sample"
	$(PY) sample.py --out_dir=out-quickstart --start="The for statement" --num_samples=1 --max_new_tokens=150
	@echo "--- 5. evaluate: before finetuning, after it, and after the same steps from scratch"
	@$(PY) evaluate.py --out_dir=out-quickstart-base --dataset=python_docs/topics
	@$(PY) evaluate.py --out_dir=out-quickstart --dataset=python_docs/topics
	@$(PY) evaluate.py --out_dir=out-quickstart-scratch --dataset=python_docs/topics

chat: .venv/.runs
	$(PY) data/python_docs/prepare.py
	@echo "--- 1. pretrain the quickstart's model, unless that is done"
	$(call train,out-quickstart-base,config/quickstart_pretrain.py)
	@echo "--- 2. finetune it on conversations about the library's classes and functions, unless that is done"
	$(PY) data/chat/prepare.py --input=$(TALKS)/train.jsonl --val_input=$(TALKS)/val.jsonl --test_input=$(TALKS)/test.jsonl --out_dir=data/python_docs/chat --tokenizer=data/python_docs/docstrings --block_size=128 --user=Q: --assistant=A: --end='\n--\n'
	$(call train,out-quickstart-chat,config/quickstart_chat.py)
	@echo "--- 3. evaluate: the loss of the answers before and after finetuning; last answers of test conversations"
	@$(PY) evaluate.py --out_dir=out-quickstart-base --dataset=python_docs/chat
	@$(PY) evaluate.py --out_dir=out-quickstart-chat --dataset=python_docs/chat
	@$(PY) evaluate.py --task=generate --out_dir=out-quickstart-chat --dataset=python_docs/chat
	@echo "--- 4. talk to it"
	@if [ -t 0 ]; then $(CHAT); else printf '%s\n' $(QUESTIONS) | $(CHAT); fi

TALKS = data/python_docs/conversations
CHAT = $(PY) sample.py --out_dir=out-quickstart-chat --chat --temperature=0.3
QUESTIONS = "What does shutil.copyfile(src, dst) do?" "Which module is it in?" "What does it take?"

sentiment: .venv/.runs
	$(PY) -m pip install -q "scikit-learn>=1.5,<2"
	$(PY) experiments/twitter_sentiment.py $(ARGS)

test: .venv/.tests
	$(PY) -m pytest -q -n auto --maxprocesses=4 --dist worksteal

test-slow: .venv/.tests
	$(PY) -m pytest -q -m slow

test-browser: .venv/.tests
	$(PY) -m pip install -q "playwright>=1.49,<2"
	$(PY) -m pytest -q -m browser

chaos: .venv/.tests
	PYTHONPATH=. PYTHONWARNINGS=ignore::UserWarning:multiprocessing.resource_tracker $(PY) tests/chaos.py

bench: .venv/.tests
	$(PY) bench.py train --repeats=1 --compiled=False $(ARGS)
	$(PY) bench.py sample --repeats=1 $(ARGS)
	$(PY) bench.py load --repeats=1 $(ARGS)

lint: .venv/.tests
	$(PY) -m ruff check .

clean:
	rm -rf .venv out-quickstart out-quickstart-base out-quickstart-chat out-quickstart-scratch

.venv/.runs: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	@$(INSTALLING)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/.tests: requirements.txt requirements-export.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	@$(INSTALLING)
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@ .venv/.runs
