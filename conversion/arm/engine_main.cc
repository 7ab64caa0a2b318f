// LiteRT-LM's C library on one bundle, asked through pipes: engine LIBRARY BUNDLE CACHE THREADS [KERNEL]
//
// A question is a line "<bytes of prefix> <bytes of text>" and the bytes of both. The prefix is taken in; then a text
// is scored, or, where it is empty, one token is written. The answer is a line "scores <count>" and as many float32,
// "text <bytes>" and the bytes, or "refused 0". Before the first question comes "ready 0". The library is opened at
// run time, by the names that its Python package calls too, so no header of it is needed.

#include <dlfcn.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

void* library;

// A function of the library; `Result` and `Arguments` are those of LiteRT-LM's c/engine.h.
template <typename Result = void, typename... Arguments>
Result Call(const char* name, Arguments... arguments) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "the library has no %s\n", name);
    std::exit(1);
  }
  return reinterpret_cast<Result (*)(Arguments...)>(found)(arguments...);
}

int Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  return 1;
}

std::string Read(size_t bytes) {
  std::string found(bytes, '\0');
  if (std::fread(&found[0], 1, bytes, stdin) != bytes) std::exit(1);
  return found;
}

void Answer(const char* kind, size_t count, const void* bytes, size_t size) {
  std::printf("%s %zu\n", kind, count);
  std::fwrite(bytes, 1, size, stdout);
  std::fflush(stdout);
}

void* MakeEngine(const char* bundle, const char* cache, int threads) {
  constexpr int kError = 4;
  Call("litert_lm_set_min_log_level", kError);
  const char* none = nullptr;
  void* settings = Call<void*>("litert_lm_engine_settings_create", bundle, "cpu", none, none);
  if (settings == nullptr) return nullptr;
  Call("litert_lm_engine_settings_set_num_threads", settings, threads);
  Call("litert_lm_engine_settings_set_cache_dir", settings, cache);
  void* engine = Call<void*>("litert_lm_engine_create", settings);
  Call("litert_lm_engine_settings_delete", settings);
  return engine;
}

// A session that writes one greedy token and puts no template around what it reads.
void* MakeSession(void* engine) {
  constexpr int kTopP = 2;
  void* sampler = Call<void*>("litert_lm_sampler_params_create", kTopP);
  Call("litert_lm_sampler_params_set_top_k", sampler, 1);
  Call("litert_lm_sampler_params_set_temperature", sampler, 0.0f);
  void* config = Call<void*>("litert_lm_session_config_create");
  Call("litert_lm_session_config_set_sampler_params", config, sampler);
  Call("litert_lm_session_config_set_max_output_tokens", config, 1);
  Call("litert_lm_session_config_set_apply_prompt_template", config, false);
  void* session = Call<void*>("litert_lm_engine_create_session", engine, config);
  Call("litert_lm_session_config_delete", config);
  Call("litert_lm_sampler_params_delete", sampler);
  return session;
}

bool Prefill(void* session, const std::string& prefix) {
  constexpr int kText = 0;
  const void* bytes = prefix.data();
  void* input = Call<void*>("litert_lm_input_data_create", kText, bytes, prefix.size());
  const int status = Call<int>("litert_lm_session_run_prefill", session, &input, size_t{1});
  Call("litert_lm_input_data_delete", input);
  return status == 0;
}

// What follows the prefix, or null where the engine refuses.
void* Follow(void* session, const std::string& text) {
  if (text.empty()) return Call<void*>("litert_lm_session_run_decode", session);
  const char* target = text.c_str();
  return Call<void*>("litert_lm_session_run_text_scoring", session, &target, size_t{1}, false);
}

void Reply(void* engine, const std::string& prefix, const std::string& text) {
  void* session = MakeSession(engine);
  void* found = session != nullptr && Prefill(session, prefix) ? Follow(session, text) : nullptr;
  if (found == nullptr) {
    Answer("refused", 0, "", 0);
  } else if (text.empty()) {
    const char* token = Call<const char*>("litert_lm_responses_get_response_text_at", found, 0);
    const size_t size = token == nullptr ? 0 : std::strlen(token);
    Answer("text", size, size ? token : "", size);
  } else {
    const int count = Call<int>("litert_lm_responses_get_num_token_scores_at", found, 0);
    const float* scores = Call<const float*>("litert_lm_responses_get_token_scores_at", found, 0);
    Answer("scores", count, scores, count * sizeof(float));
  }
  if (found != nullptr) Call("litert_lm_responses_delete", found);
  if (session != nullptr) Call("litert_lm_session_delete", session);
}

}  // namespace

int main(int count, char** words) {
  if (count < 5) return Fail("engine LIBRARY BUNDLE CACHE THREADS [KERNEL]");
  library = dlopen(words[1], RTLD_NOW);
  if (library == nullptr) return Fail(dlerror());
  if (count > 5) {  // see conversion/kernel/README.md
    void* kernel = dlopen(words[5], RTLD_NOW);
    if (kernel == nullptr) return Fail(dlerror());
    auto door = static_cast<void**>(dlsym(library, "LiteRtStaticLinkedAcceleratorGpuDef"));
    if (door == nullptr) return Fail("the library has no place for an accelerator");
    *door = dlsym(kernel, "LiteRtAcceleratorImpl");
  }
  void* engine = MakeEngine(words[2], words[3], std::atoi(words[4]));
  if (engine == nullptr) return Fail("the engine cannot load the bundle");
  Answer("ready", 0, "", 0);
  size_t prefix, text;
  while (std::scanf("%zu %zu", &prefix, &text) == 2 && std::getchar() == '\n') {
    const std::string first = Read(prefix);
    Reply(engine, first, Read(text));
  }
  Call("litert_lm_engine_delete", engine);
  return 0;
}
