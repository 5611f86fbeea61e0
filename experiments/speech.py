"""Ten words, spoken by eSpeak NG in many voices: synthetic speech, not recordings of people.

Needs the command `espeak-ng` (`apt-get install espeak-ng`). No voice of the training set speaks in
the test set.
"""

import itertools
import shutil
import subprocess

import keras
import numpy as np

# Ten words of Speech Commands (arXiv 1804.03209).
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
RATE = 22050  # samples per second, of eSpeak NG
TEST_EXAMPLES = 1000
WAV_HEADER = 44  # bytes


def voices():
    """Names of the variants of a voice, by which speakers differ."""
    listed = subprocess.run(
        ["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True
    )
    names = [line.split("!v/")[1] for line in listed.stdout.splitlines() if "!v/" in line]
    return sorted(name.split("  ")[0].split(" (")[0].strip() for name in names)


def spoken(word, voice, speed, pitch):
    """One utterance, an array of samples between -1 and 1, without silence at its ends."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    samples = np.frombuffer(wave[WAV_HEADER:], "<i2") / 2**15
    loud = np.flatnonzero(abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def clip(samples, rng):
    """One second with an utterance at a random time and level, in white noise."""
    samples = samples[:RATE]
    start = rng.integers(0, RATE - len(samples) + 1)
    clip = np.zeros(RATE)
    clip[start : start + len(samples)] = samples
    loudness = np.sqrt(np.mean(np.square(samples))) + 1e-6
    clip *= rng.uniform(0.05, 0.2) / loudness
    signal_to_noise = rng.uniform(0, 20)  # in dB
    deviation = np.sqrt(np.mean(np.square(clip))) * 10 ** (-signal_to_noise / 20)
    return clip + rng.normal(0, deviation, RATE)


def log_mel(clips):
    """Log-mel spectrograms, shape `(number, 40, 51, 1)`, about -1 to 1."""
    mel = keras.layers.MelSpectrogram(
        fft_length=1024,
        sequence_stride=RATE // 50,
        sequence_length=1024,
        sampling_rate=RATE,
        num_mel_bins=40,
        min_freq=60,
        max_freq=8000,
    )
    batches = [np.array(mel(clips[i : i + 256])) for i in range(0, len(clips), 256)]
    return (np.concatenate(batches)[..., None] / 40).astype("float32")


def spoken_words(examples):
    """Spectrograms and classes for training and test, by different voices."""
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError(
            "The words are spoken by the command `espeak-ng`: install it (`apt-get install "
            "espeak-ng`), or leave out keywords by --tasks."
        )
    rng = np.random.default_rng(2)
    names = rng.permutation(voices())
    of_test = len(names) // 4
    sets = []
    for number, variants in ((examples, names[of_test:]), (TEST_EXAMPLES, names[:of_test])):
        clips, labels = [], []
        for label in itertools.islice(itertools.cycle(range(len(WORDS))), number):
            voice = f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"
            speed, pitch = rng.integers(120, 220), rng.integers(20, 80)
            clips.append(clip(spoken(WORDS[label], voice, speed, pitch), rng))
            labels.append(label)
        sets.append((log_mel(np.array(clips, "float32")), np.array(labels, "int32")))
    return sets
