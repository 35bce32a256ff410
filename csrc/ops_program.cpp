// Bindings of a program: a network's step as a list of instructions (engine/program.py writes it),
// run without Python between them.
//
// Registers hold tensors: 0 and 1 what the caller gives, the others results. Norms and attention
// go straight to their kernels, with no look at layouts that the recording has seen already; every
// other operator through torch's dispatcher, with the arguments it was recorded with. Between two
// operators of a step of batch 1, Python and the front doors took 25 us, of 90 us in all.
#ifndef ENGINE_EMULATE
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ops.h"

namespace engine::ops {
namespace {

enum Instruction : int64_t {
  kNorm = 0,
  kAttention = 1,
  kCall = 2,
  kView = 3,
  kFree = 4,
  kCopy = 5
};
enum Argument : int64_t {
  kNone = 0,
  kRegister = 1,
  kConstant = 2,
  kInt = 3,
  kFloat = 4,
  kBool = 5,
  kInts = 6,
  kTensors = 7,
  kOptional = 8,  // and then what it holds
  kFloats = 9,
};

struct Program {
  std::vector<Tensor> constants;
  std::vector<std::string> strings;
  std::vector<int64_t> code;
};

// Numbers, not pointers, cross the boundary: a wrong one is an error, not a crash.
struct Programs {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Program>> all;
  int64_t last = 0;
};
Programs& programs() {
  static auto* const found = new Programs;  // never destroyed: threads may outlive static objects
  return *found;
}

struct Span {
  const int64_t* data;
  int64_t count;
};

class Run {
 public:
  Run(const Program& program, const Tensor& x, const Tensor& rows)
      : program_(program), at_(program.code.data()), end_(at_ + program.code.size()) {
    registers_.resize(next());
    result_ = next();
    expect(x, "x"), expect(rows, "rows");
    reg(0) = x, reg(1) = rows;
  }

  Tensor run() {
    while (at_ < end_) {
      switch (next()) {
        case kNorm:
          norm();
          break;
        case kAttention:
          attention();
          break;
        case kCall:
          call();
          break;
        case kView:
          view();
          break;
        case kCopy:
          copy();
          break;
        case kFree: {
          const Span span = numbers();
          for (int64_t i = 0; i < span.count; ++i) reg(span.data[i]).reset();
          break;
        }
        default:
          STD_TORCH_CHECK(false, "not an instruction of a program");
      }
    }
    return tensor(result_);
  }

 private:
  // ---- operands -------------------------------------------------------------------------------

  int64_t next() {
    STD_TORCH_CHECK(at_ < end_, "a program ends within an instruction");
    return *at_++;
  }
  double next_double() {
    const int64_t bits = next();
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  Span numbers() {
    const int64_t count = next();
    STD_TORCH_CHECK(count >= 0 && count <= end_ - at_, "a program ends within an instruction");
    const Span span{at_, count};
    at_ += count;
    return span;
  }
  OptionalTensor& reg(int64_t i) { return registers_.at(static_cast<size_t>(i)); }
  const Tensor& tensor(int64_t i) {
    const OptionalTensor& found = reg(i);
    STD_TORCH_CHECK(found.has_value(), "a program reads a register that is empty");
    return *found;
  }
  const Tensor& constant(int64_t i) const { return program_.constants.at(static_cast<size_t>(i)); }

  void expect(const Tensor& t, const char* name) {
    const Span sizes = numbers(), strides = numbers();
    bool same = t.dim() == sizes.count && next() == static_cast<int64_t>(t.scalar_type());
    for (int64_t i = 0; same && i < sizes.count; ++i) {
      same = t.size(i) == sizes.data[i] && (sizes.data[i] == 1 || t.stride(i) == strides.data[i]);
    }
    STD_TORCH_CHECK(same && t.is_cpu(), name, " is not as it was when the program was recorded");
  }

  // (register, element past its first), in elements of `dtype`; register -1: absent.
  char* pointer(DType dtype) {
    const int64_t from = next(), skip = next();
    if (from < 0) return nullptr;
    return static_cast<char*>(tensor(from).data_ptr()) + skip * (dtype == DType::f32 ? 4 : 2);
  }
  Operand small(int64_t C) {  // weight or bias, a constant that may have been trained on
    const int64_t i = next();
    if (i < 0) return {};
    const Tensor& t = constant(i);
    STD_TORCH_CHECK(t.numel() == C, "a norm's weight is no longer of ", C, " channels");
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(),
                    "a norm's weight is no longer contiguous on the CPU");
    return {t.data_ptr(), 0, dtype_of(t, "weight")};
  }
  Operand per_sample_operand() {
    const DType dtype = static_cast<DType>(next());
    const int64_t row = next();
    return {pointer(dtype), row, dtype};
  }
  static int64_t scalar_type_of(DType dtype) {
    const auto type = dtype == DType::f32    ? ScalarType::Float
                      : dtype == DType::bf16 ? ScalarType::BFloat16
                                             : ScalarType::Half;
    return static_cast<int64_t>(type);
  }
  // A result: its register, sizes and strides.
  Tensor result(int64_t scalar_type) {
    const int64_t to = next();
    const Span sizes = numbers(), strides = numbers();
    AtenTensorHandle handle = nullptr;
    const auto type = torch::stable::detail::from(static_cast<ScalarType>(scalar_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.count, sizes.data, strides.data,
                                                    torch::stable::detail::to<int32_t>(type),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor made(handle);
    reg(to) = made;
    return made;
  }

  // ---- instructions ---------------------------------------------------------------------------

  void norm() {
    engine::GroupNormSilu p;
    p.dtype = static_cast<DType>(next());
    p.x = pointer(p.dtype), p.x2 = pointer(p.dtype);
    p.N = next(), p.C = next(), p.C2 = next(), p.S = next(), p.G = next();
    p.channels_last = next() != 0, p.silu = next() != 0;
    p.eps = static_cast<float>(next_double());
    p.weight = small(p.C), p.bias = small(p.C);
    p.add = per_sample_operand(), p.scale = per_sample_operand(), p.shift = per_sample_operand();
    const Tensor y = result(scalar_type_of(p.dtype));
    floats_.resize(2 * p.N * p.G);
    engine::group_norm_silu_fwd_cpu(p, y.data_ptr(), floats_.data(), floats_.data() + p.N * p.G,
                                    Cpu::parallel_for());
  }

  void attention() {
    engine::Attention p;
    p.dtype = static_cast<DType>(next());
    char* data = pointer(p.dtype);
    p.N = next(), p.H = next(), p.S = p.Sk = next(), p.D = next();
    const int64_t n = next(), s = next(), width = p.H * p.D;
    p.scale = static_cast<float>(next_double());
    const int64_t bytes = width * (p.dtype == DType::f32 ? 4 : 2);
    p.q = {data, n, p.D, s, 1};
    p.k = {data + bytes, n, p.D, s, 1};
    p.v = {data + 2 * bytes, n, p.D, s, 1};
    const Tensor out = result(scalar_type_of(p.dtype));
    engine::attention_fwd_cpu(p, {out.data_ptr(), p.S * width, p.D, width, 1}, nullptr,
                              Cpu::parallel_for());
  }

  void copy() {
    const Tensor& from = tensor(next());
    const int64_t type = next();
    Tensor to = result(type);
    torch::stable::copy_(to, from);
  }

  void view() {
    const int64_t to = next();
    const Tensor& from = tensor(next());
    const Span sizes = numbers(), strides = numbers();
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(from.get(), sizes.count, sizes.data,
                                                          strides.data, next(), &handle));
    reg(to) = Tensor(handle);
  }

  // The dispatcher takes over what an argument holds.
  StableIValue argument() {
    using torch::stable::detail::from;
    switch (next()) {
      case kNone:
        return from(std::nullopt);
      case kRegister:
        return from(tensor(next()));
      case kConstant:
        return from(constant(next()));
      case kInt:
        return from(next());
      case kFloat:
        return from(next_double());
      case kBool:
        return from(next() != 0);
      case kInts: {
        const Span span = numbers();
        return from(std::vector<int64_t>(span.data, span.data + span.count));
      }
      case kFloats: {
        std::vector<double> all(static_cast<size_t>(next()));
        for (double& value : all) value = next_double();
        return from(all);
      }
      case kTensors: {
        const Span span = numbers();
        std::vector<Tensor> all;
        for (int64_t i = 0; i < span.count; ++i) all.push_back(tensor(span.data[i]));
        return from(all);
      }
      case kOptional:
        return from(new StableIValue(argument()));
      default:
        STD_TORCH_CHECK(false, "not an argument of a program");
    }
    return 0;
  }

  void call() {
    const std::string& name = program_.strings.at(static_cast<size_t>(next()));
    const std::string& overload = program_.strings.at(static_cast<size_t>(next()));
    const int64_t count = next();
    stack_.clear();
    for (int64_t i = 0; i < count; ++i) stack_.push_back(argument());
    const Span results = numbers();
    stack_.resize(count > results.count ? count : results.count);
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(name.c_str(), overload.c_str(), stack_.data(), TORCH_ABI_VERSION));
    for (int64_t i = 0; i < results.count; ++i) {
      Tensor made = torch::stable::detail::to<Tensor>(stack_[i]);
      if (results.data[i] >= 0) reg(results.data[i]) = std::move(made);
    }
  }

  const Program& program_;
  const int64_t *at_, *end_;
  std::vector<OptionalTensor> registers_;
  std::vector<StableIValue> stack_;
  std::vector<float> floats_;  // mean and rstd, which nobody asks for
  int64_t result_;
};

int64_t program_new(std::vector<Tensor> constants, std::vector<std::string> strings,
                    std::vector<int64_t> code) {
  auto program = std::make_shared<const Program>(
      Program{std::move(constants), std::move(strings), std::move(code)});
  const std::lock_guard<std::mutex> lock(programs().mutex);
  programs().all[++programs().last] = std::move(program);
  return programs().last;
}

void program_free(int64_t number) {
  const std::lock_guard<std::mutex> lock(programs().mutex);
  programs().all.erase(number);
}

Tensor program_run(int64_t number, const Tensor& x, const Tensor& rows) {
  std::shared_ptr<const Program> program;
  {
    const std::lock_guard<std::mutex> lock(programs().mutex);
    const auto found = programs().all.find(number);
    STD_TORCH_CHECK(found != programs().all.end(), "there is no program ", number);
    program = found->second;
  }
  return Run(*program, x, rows).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def("program_new(Tensor[] constants, str[] strings, int[] code) -> int");
  m.def("program_free(int program) -> ()");
  m.def("program_run(int program, Tensor x, Tensor rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CompositeExplicitAutograd, m) {
  m.impl("program_new", TORCH_BOX(&program_new));
  m.impl("program_free", TORCH_BOX(&program_free));
}
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) { m.impl("program_run", TORCH_BOX(&program_run)); }

}  // namespace engine::ops
#endif
